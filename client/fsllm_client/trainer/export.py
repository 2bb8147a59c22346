"""From the tensors that sites exchange to the tensors that ``PeftModel.from_pretrained`` reads. Needs only numpy.

They are the same for every kind but P-tuning. There PEFT's own export keeps the encoder's output and drops the encoder,
so that no two of them could be averaged: the sites exchange the encoder's raw parameters, and only the final adapter is
reduced to what PEFT loads.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Array = npt.NDArray[np.float32]

_ENCODER = "prompt_encoder."


def peft_tensors(tensors: Mapping[str, Array]) -> dict[str, Array]:
    """Return the tensors to save as ``adapter_model.safetensors`` beside the adapter's configuration.

    Args:
        tensors: An adapter's tensors by name, as the sites exchange them.

    """
    import numpy as np

    if not any(name.startswith(_ENCODER) for name in tensors):
        return dict(tensors)
    # PEFT's PromptEncoder of kind MLP: embedding, then linear, ReLU, linear, ReLU, linear.
    hidden = tensors[f"{_ENCODER}embedding.weight"]  # (virtual tokens, width)
    for layer in (0, 2, 4):
        weight, bias = (tensors[f"{_ENCODER}mlp_head.{layer}.{part}"] for part in ("weight", "bias"))
        hidden = hidden @ weight.T + bias
        if layer < 4:
            hidden = np.maximum(hidden, 0)
    return {"prompt_embeddings": np.ascontiguousarray(hidden, dtype=np.float32)}
