"""Measuring an adapter: loss over answer tokens, perplexity, and exact match of greedy answers.

Runs on every rank (under ZeRO-3 a forward pass is everyone's), each with its share of the batches; packing is off.
Nothing that training uses is touched: no random number is drawn, and the optimizer's state is not looked at.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fsllm_client.trainer.answers import AnswerLogits, summed_loss
from fsllm_client.trainer.generate import batches_of, greedy
from fsllm_client.trainer.loop import to_device
from fsllm_client.trainer.normalise import same_answer
from fsllm_common.errors import FsllmError, TrainingFailed

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

    from fsllm_client.data.tokenise import Encoded
    from fsllm_client.trainer.group import Group
    from fsllm_common.plan import Plan


@dataclass(frozen=True, slots=True)
class Measured:
    """Metrics as the plan wants them, and what stands behind them."""

    metrics: dict[str, float]
    counts: dict[str, int]
    """examples and tokens behind the loss; answers behind exact match."""


def evaluate(
    model: PeftModel,
    answers: AnswerLogits,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Encoded],
    plan: Plan,
    group: Group,
    *,
    batch_size: int,
    progress: Callable[[int, int], None],
    cancelled: Callable[[], bool],
) -> Measured:
    """Measure the model on the first ``plan.evaluate.limit`` examples.

    Raises:
        TrainingFailed: LOSS_NOT_FINITE.
        FsllmError: ORDER_UNKNOWN, when cancelled.

    """
    examples = examples[: plan.evaluate.limit]
    wanted = plan.evaluate.metrics
    answered = [example for example in examples if example.reference is not None] if "exact_match" in wanted else []
    total = len(examples) + len(answered)
    was_training = model.training
    model.eval()
    metrics: dict[str, float] = {}
    counts = {"examples": len(examples), "tokens": 0}
    steps = _Steps(group, total, progress, cancelled)
    try:
        if examples:
            loss, counts["tokens"] = _loss(model, answers, tokenizer, examples, group, batch_size, steps)
            found = {"loss": loss, "perplexity": math.exp(min(loss, _LARGEST_EXPONENT))}
            metrics.update({name: found[name] for name in wanted if name in found})
        if answered:
            at_once = max(batch_size, _ANSWERS_AT_ONCE)
            metrics["exact_match"] = _exact_match(model, tokenizer, answered, plan, group, at_once, steps)
            counts["answers"] = len(answered)
    finally:
        model.train(was_training)
    return Measured(metrics, counts)


_LARGEST_EXPONENT = 700.0  # exp of more is no float64
_ANSWERS_AT_ONCE = 32  # writing keeps the logits of one position a prompt, so more fit than in a training step


@dataclass(slots=True)
class _Steps:
    """Counts the examples done on all ranks."""

    group: Group
    total: int
    progress: Callable[[int, int], None]
    cancelled: Callable[[], bool]
    done: int = 0

    def advance(self, examples: int) -> None:
        done, wants_end = self.group.total(examples, float(self.cancelled()))
        self.done += int(done)
        self.progress(self.done, self.total)
        if wants_end:
            raise FsllmError("ORDER_UNKNOWN", f"the evaluation was given up after {self.done} of {self.total} examples")


def _loss(
    model: PeftModel,
    answers: AnswerLogits,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Encoded],
    group: Group,
    batch_size: int,
    steps: _Steps,
) -> tuple[float, int]:
    import torch

    from fsllm_client.data.batches import evaluation_batches
    from fsllm_client.data.tokenise import special_ids

    batches = list(evaluation_batches(examples, batch_size=batch_size, pad=special_ids(tokenizer).pad))
    summed, tokens = 0.0, 0
    for batch, counts in group.share(batches):
        inputs = dict(batch.inputs)
        labels: torch.Tensor = inputs.pop("labels")
        with torch.no_grad():
            loss = summed_loss(*answers(model, to_device(inputs, group.device), labels, group.device))
        if counts:
            summed, tokens = summed + float(loss.double()), tokens + batch.answer_tokens
        steps.advance(batch.examples if counts else 0)
    summed, all_tokens = group.total(summed, tokens)
    loss_a_token = summed / max(1.0, all_tokens)
    if not math.isfinite(loss_a_token):
        raise TrainingFailed("LOSS_NOT_FINITE", "the loss on the validation rows is not a finite number")
    return loss_a_token, int(all_tokens)


def _exact_match(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Encoded],
    plan: Plan,
    group: Group,
    batch_size: int,
    steps: _Steps,
) -> float:
    from fsllm_client.data.tokenise import special_ids

    special = special_ids(tokenizer)
    prompts = [[int(token) for token in example.prompt_ids] for example in examples]
    equal = bool(model.active_peft_config.is_prompt_learning)
    same = 0
    for batch, counts in group.share(batches_of([len(p) for p in prompts], batch_size, equal=equal)):
        answers = greedy(
            model,
            [prompts[index] for index in batch],
            most=plan.evaluate.max_new_tokens,
            ends=_ends(model, special.eos),
            pad=special.pad,
            device=group.device,
            all_done=lambda done: group.total(float(done))[0] == group.world,
        )
        texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
        if counts:
            same += sum(
                same_answer(plan.evaluate.normalizer, text, examples[index].reference or "")
                for index, text in zip(batch, texts, strict=True)
            )
        steps.advance(len(batch) if counts else 0)
    return group.total(same)[0] / len(examples)


def _ends(model: PeftModel, eos: int) -> set[int]:
    """Chat models name more than one end: the tokenizer's, and those of their generation settings."""
    settings = getattr(model.get_base_model(), "generation_config", None)
    named = getattr(settings, "eos_token_id", None)
    return {eos, *(named if isinstance(named, list) else [] if named is None else [named])}
