"""Logits of the answers alone against transformers' own loss over everything."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from fsllm_client.trainer.adapters import adapter_parameters, attach
from fsllm_client.trainer.answers import AnswerLogits, summed_loss
from fsllm_client.trainer.base_model import load_model
from fsllm_common.plan import Plan

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

CPU = torch.device("cpu")
IDS = torch.randint(3, 250, (3, 11), generator=torch.Generator().manual_seed(5))
ANSWERS = torch.tensor([[0] * 4 + [1] * 3 + [0] * 2 + [1] * 2, [0] * 10 + [1], [0] * 11]).bool()
"""Answers in the middle and at the end, one token long, and a sequence without any."""
LABELS = torch.where(ANSWERS, IDS, -100)


def _model(kind: str, folder: Path) -> PeftModel:
    plan = Plan.model_validate(
        {"name": "t", "model": {"name": "tiny"}, "adapter": {"kind": kind, "rank": 3, "virtual_tokens": 5}}
    )
    torch.manual_seed(1)
    model = attach(plan, load_model(folder, torch.float32)).eval()
    for parameter in adapter_parameters(model).values():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def _gradients(model: PeftModel, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in adapter_parameters(model).items()}


@pytest.mark.parametrize("kind", ["lora", "ia3", "prefix", "prompt", "p-tuning"])
def test_loss_and_gradients_are_transformers_own(kind: str, tiny_model: Path) -> None:
    model = _model(kind, tiny_model)
    inputs = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "use_cache": False}
    whole = model(**inputs, labels=LABELS).loss * int(ANSWERS.sum())  # theirs is the mean
    expected = _gradients(model, whole)

    answers = AnswerLogits(model)
    assert answers.check(model, 250, CPU)
    logits, targets = answers(model, inputs, LABELS, CPU)
    loss = summed_loss(logits, targets)

    assert logits.shape == (int(ANSWERS.sum()), model.config.vocab_size)
    assert float(loss) == pytest.approx(float(whole), rel=1e-5)
    for name, gradient in _gradients(model, loss).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6)
    assert max(float(gradient.abs().max()) for gradient in expected.values()) > 1e-3


def test_a_batch_without_answers_has_no_loss_and_no_gradient(tiny_model: Path) -> None:
    model = _model("lora", tiny_model)
    answers = AnswerLogits(model)
    inputs = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "use_cache": False}
    loss = summed_loss(*answers(model, inputs, torch.full_like(IDS, -100), CPU))
    assert float(loss) == 0.0
    assert not any(bool(gradient.any()) for gradient in _gradients(model, loss).values())


def test_other_calls_of_the_model_have_all_their_logits(tiny_model: Path) -> None:
    model = _model("lora", tiny_model)
    before = model(input_ids=IDS).logits
    answers = AnswerLogits(model)
    answers(model, {"input_ids": IDS, "use_cache": False}, LABELS, CPU)
    torch.testing.assert_close(model(input_ids=IDS).logits, before, rtol=0, atol=0)
    with pytest.raises(IndexError):  # a call that fails leaves nothing behind
        answers(model, {"input_ids": IDS + 10_000, "use_cache": False}, LABELS, CPU)
    torch.testing.assert_close(model(input_ids=IDS).logits, before, rtol=0, atol=0)


def _reversed(module: torch.nn.Module, arguments: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
    """A model that changes the order of positions after its head."""
    return output.flip(1)


def _one_by_one(head: torch.nn.Linear) -> Callable[[torch.Tensor], torch.Tensor]:
    """A head that is given all positions in one row."""
    product = head.forward

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        return product(hidden.reshape(3 if hidden.shape[0] == 3 else 2, -1, hidden.shape[-1]))

    return forward


def test_a_model_that_does_more_with_positions_after_its_head_is_computed_whole(tiny_model: Path) -> None:
    model = _model("lora", tiny_model)
    model.get_base_model().lm_head.register_forward_hook(_reversed)
    answers = AnswerLogits(model)
    assert not answers.check(model, 250, CPU)
    inputs = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "use_cache": False}
    whole = model(**inputs, labels=LABELS).loss * int(ANSWERS.sum())
    assert float(summed_loss(*answers(model, inputs, LABELS, CPU))) == pytest.approx(float(whole), rel=1e-5)


def test_a_head_that_can_not_take_the_answers_alone_is_given_everything(tiny_model: Path) -> None:
    model = _model("lora", tiny_model)
    head = model.get_base_model().lm_head
    head.forward = _one_by_one(head)
    answers = AnswerLogits(model)
    assert not answers.check(model, 250, CPU)
    inputs = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "use_cache": False}
    assert answers(model, inputs, LABELS, CPU)[0].shape[0] == int(ANSWERS.sum())
