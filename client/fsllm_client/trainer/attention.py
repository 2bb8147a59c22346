"""Attention over packed examples on a CPU, block by block.

transformers keeps the examples of a sequence apart by a mask over all its pairs of tokens. On a CPU torch's SDPA
computes every pair, masked or not: with four examples in 512 tokens three quarters for nothing, a tenth of a training
step. Here it is called on the blocks of the diagonal, each with its own piece of the mask: so windows and whatever else
the mask says are kept, and the result is the same.

On a GPU nothing is changed: there one large call costs less than many small ones, and Flash attention, where the model
is set to use it, skips the other blocks by itself.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

_NAME = "fsllm_blocks"


def attend_by_blocks(model: PreTrainedModel, device: torch.device) -> None:
    """Have a model that attends by SDPA on a CPU do it block by block."""
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import sdpa_mask
    except ImportError:
        return  # before 4.53 no model tells packed examples apart, and none are packed
    if device.type != "cpu" or model.config.get_text_config()._attn_implementation != "sdpa":
        return
    AttentionInterface.register(_NAME, _attend)
    AttentionMaskInterface.register(_NAME, sdpa_mask)
    model.set_attn_implementation(_NAME)


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,  # noqa: ANN401 (transformers')
) -> tuple[torch.Tensor, None]:
    """Do what transformers' function for SDPA does. query, key and value: (sequences, heads, tokens, features)."""
    import torch
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    blocks = _blocks(query, key, attention_mask, kwargs.get("position_ids"))
    if attention_mask is None or blocks is None:
        whole: tuple[torch.Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        return whole
    rows = []
    # Split, not sliced: the gradient of each slice would be a whole tensor of zeros around it.
    for bounds, mask, *row in zip(
        blocks, *(torch.split(t, 1) for t in (attention_mask, query, key, value)), strict=True
    ):
        spans = list(pairwise(bounds))
        sizes = [end - begin for begin, end in spans]
        parts = [
            sdpa_attention_forward(module, *part, mask[..., begin:end, begin:end], **kwargs)[0]
            for (begin, end), *part in zip(spans, *(torch.split(t, sizes, dim=2) for t in row), strict=True)
        ]
        rows.append(torch.cat(parts, dim=1))
    return torch.cat(rows), None


def _blocks(
    query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, positions: torch.Tensor | None
) -> list[list[int]] | None:
    """Return where the examples of each sequence begin, and the end; None where sequences are not packed.

    Found anew in every layer, and not handed down: gradient checkpointing calls the layers again by themselves.
    """
    sequences, length = query.shape[0], query.shape[2]
    if positions is None or mask is None or positions.shape != (sequences, length) or key.shape[2] != length:
        return None
    if mask.shape[0] != sequences or not bool(mask.diagonal(dim1=-2, dim2=-1).all()):
        return None  # padding, which sees nothing: not even itself
    begins = [(row == 0).nonzero().flatten().tolist() for row in positions]
    if all(begin == [0] for begin in begins) or any(begin[:1] != [0] for begin in begins):
        return None
    return [[*begin, length] for begin in begins]
