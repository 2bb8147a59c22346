"""Attention by blocks against transformers' own, whole; and that the blocks are all that is computed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers.integrations.sdpa_attention as theirs
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, PreTrainedModel

from fsllm_client.trainer.attention import attend_by_blocks

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

CPU = torch.device("cpu")
SIZES = {
    "vocab_size": 50,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
IDS = torch.randint(50, (2, 12), generator=torch.Generator().manual_seed(3))
POSITIONS = torch.tensor([[*range(5), *range(4), *range(3)], [*range(10), *range(2)]])


def _llama() -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**SIZES))


def _window() -> PreTrainedModel:
    return MistralForCausalLM(MistralConfig(**SIZES, sliding_window=3))


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of pairs of tokens of each call of SDPA, over all sequences."""
    pairs: list[int] = []
    whole = torch.nn.functional.scaled_dot_product_attention

    def attention(query: torch.Tensor, key: torch.Tensor, *arguments: Any, **more: Any) -> torch.Tensor:  # noqa: ANN401
        pairs.append(query.shape[0] * query.shape[2] * key.shape[2])
        return whole(query, key, *arguments, **more)

    monkeypatch.setattr(theirs.torch.nn.functional, "scaled_dot_product_attention", attention)
    return pairs


def _outcome(model: PreTrainedModel, **inputs: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    model.zero_grad()
    logits = model(input_ids=IDS, use_cache=False, **inputs).logits
    logits.square().mean().backward()
    return logits.detach(), [parameter.grad.clone() for parameter in model.parameters()]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("make", [_llama, _window])
def test_packed_examples_give_the_same_logits_and_gradients_for_less(
    make: Callable[[], PreTrainedModel], checkpointing: bool, computed: list[int]
) -> None:
    torch.manual_seed(2)
    model = make().train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    expected, gradients = _outcome(model, position_ids=POSITIONS)
    assert sum(computed) == 2 * 2 * 12 * 12 * (1 + checkpointing)
    computed.clear()
    attend_by_blocks(model, CPU)
    found, ours = _outcome(model, position_ids=POSITIONS)
    assert sum(computed) == 2 * (25 + 16 + 9 + 100 + 4) * (1 + checkpointing)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    for one, other in zip(ours, gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-7)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batches_are_computed_whole(side: str, computed: list[int]) -> None:
    torch.manual_seed(2)
    model = _llama().eval()
    mask = torch.ones_like(IDS)
    mask[0, :4] = 0
    if side == "right":
        mask = mask.flip(1)
    # As answers are written: positions are 0 for all the padding, and for the first word.
    inputs = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    expected, _ = _outcome(model, **inputs)
    calls = list(computed)
    computed.clear()
    attend_by_blocks(model, CPU)
    found, _ = _outcome(model, **inputs)
    assert computed == calls
    seen = mask.bool()
    torch.testing.assert_close(found[seen], expected[seen], rtol=0, atol=0)


def test_other_kinds_of_attention_and_of_devices_are_left_alone(tiny_model: Path) -> None:
    eager = LlamaForCausalLM._from_config(LlamaConfig(**SIZES), attn_implementation="eager")
    attend_by_blocks(eager, CPU)
    assert eager.config._attn_implementation == "eager"
    model = _llama()
    attend_by_blocks(model, torch.device("cuda"))
    assert model.config._attn_implementation == "sdpa"
