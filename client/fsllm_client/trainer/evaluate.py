"""Measuring an adapter: loss over answer tokens, perplexity, and exact match of greedy answers.

Runs on every rank (under ZeRO-3 a forward pass is everyone's), each with its share of the batches; packing is off.
Nothing that training uses is touched: no random number is drawn, and the optimizer's state is not looked at.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fsllm_client.trainer.answers import summed_loss, to_device
from fsllm_client.trainer.generate import batches_of, greedy
from fsllm_client.trainer.normalise import same_answer
from fsllm_client.trainer.preference import measure
from fsllm_common.errors import FsllmError, TrainingFailed

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

    from fsllm_client.data.batches import Batch
    from fsllm_client.data.tokenise import Encoded
    from fsllm_client.trainer.engine import Engine
    from fsllm_client.trainer.group import Group
    from fsllm_common.algorithms import LocalRule


@dataclass(frozen=True, slots=True)
class Measured:
    """Metrics as the plan wants them, and what stands behind them."""

    metrics: dict[str, float]
    counts: dict[str, int]
    """examples and tokens behind the loss; answers behind exact match."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Measures one model as a plan wants it. Every rank calls the same methods with the same examples.

    All raise TrainingFailed (LOSS_NOT_FINITE), and FsllmError (ORDER_UNKNOWN) when cancelled.
    """

    engine: Engine
    tokenizer: PreTrainedTokenizerBase
    group: Group
    batch_size: int
    progress: Callable[[int, int], None]
    cancelled: Callable[[], bool]

    def answers(self, examples: Sequence[Encoded]) -> Measured:
        """Measure the plan's metrics on its first ``evaluate.limit`` examples."""
        plan = self.engine.plan.evaluate
        examples, wanted = examples[: plan.limit], plan.metrics
        answered = [example for example in examples if example.reference is not None and "exact_match" in wanted]
        metrics: dict[str, float] = {}
        counts = {"examples": len(examples), "tokens": 0}
        with self._steps(len(examples) + len(answered)) as steps:
            if examples:
                loss, counts["tokens"] = self._loss(examples, steps)
                found = {"loss": loss, "perplexity": math.exp(min(loss, _LARGEST_EXPONENT))}
                metrics.update({name: found[name] for name in wanted if name in found})
            if answered:
                metrics["exact_match"] = self._exact_match(answered, steps)
                counts["answers"] = len(answered)
        return Measured(metrics, counts)

    def loss(self, examples: Sequence[Encoded]) -> float:
        """Return the mean loss over the answer tokens of the first ``evaluate.limit`` examples."""
        examples = examples[: self.engine.plan.evaluate.limit]
        with self._steps(len(examples)) as steps:
            return self._loss(examples, steps)[0]

    def preferences(self, examples: Sequence[Encoded], rule: LocalRule) -> Measured:
        """Measure the method's loss and the reward's accuracy on the first ``evaluate.limit`` preferences."""
        engine = self.engine
        plan = engine.plan.evaluate
        examples = examples[: plan.limit]
        if not examples:
            return Measured({}, {"examples": 0, "tokens": 0})
        batches = self._batches(examples)
        with self._steps(len(examples)) as steps:
            found, pairs = measure(
                *(engine.model, engine.answers, engine.reference, rule.pair_loss),
                *(batches, self.group, steps.advance),
            )
        return Measured(
            {name: found[name] for name in plan.metrics if name in found}, {"examples": pairs, "tokens": pairs}
        )

    @contextmanager
    def _steps(self, total: int) -> Iterator[_Steps]:
        """Have the model evaluate, and count."""
        model = self.engine.model
        was_training = model.training
        model.eval()
        try:
            yield _Steps(self.group, total, self.progress, self.cancelled)
        finally:
            model.train(was_training)

    def _batches(self, examples: Sequence[Encoded]) -> list[Batch]:
        from fsllm_client.data.batches import evaluation_batches
        from fsllm_client.data.tokenise import special_ids

        pad = special_ids(self.tokenizer).pad
        return list(evaluation_batches(examples, batch_size=self.batch_size, pad=pad))

    def _loss(self, examples: Sequence[Encoded], steps: _Steps) -> tuple[float, int]:
        """Return the loss, and the number of tokens behind it."""
        import torch

        engine, device = self.engine, self.group.device
        summed, tokens = 0.0, 0
        for batch, counts in self.group.share(self._batches(examples)):
            inputs = dict(batch.inputs)
            labels: torch.Tensor = inputs.pop("labels")
            with torch.no_grad():
                loss = summed_loss(*engine.answers(engine.model, to_device(inputs, device), labels, device))
            if counts:
                summed, tokens = summed + float(loss.double()), tokens + batch.answer_tokens
            steps.advance(batch.examples if counts else 0)
        summed, all_tokens = self.group.total(summed, tokens)
        loss_a_token = summed / max(1.0, all_tokens)
        if not math.isfinite(loss_a_token):
            raise TrainingFailed("LOSS_NOT_FINITE", "the loss on the validation rows is not a finite number")
        return loss_a_token, int(all_tokens)

    def _exact_match(self, examples: Sequence[Encoded], steps: _Steps) -> float:
        """Return the share of greedy answers that are the same as the examples'."""
        from fsllm_client.data.tokenise import special_ids

        model, group, plan = self.engine.model, self.group, self.engine.plan.evaluate
        special = special_ids(self.tokenizer)
        prompts = [[int(token) for token in example.prompt_ids] for example in examples]
        equal = bool(model.active_peft_config.is_prompt_learning)
        at_once = max(self.batch_size, _ANSWERS_AT_ONCE)
        same = 0
        for batch, counts in group.share(batches_of([len(p) for p in prompts], at_once, equal=equal)):
            answers = greedy(
                model,
                [prompts[index] for index in batch],
                most=plan.max_new_tokens,
                ends=_ends(model, special.eos),
                pad=special.pad,
                device=group.device,
                all_done=lambda done: group.total(float(done))[0] == group.world,
            )
            texts = self.tokenizer.batch_decode(answers, skip_special_tokens=True)
            if counts:
                same += sum(
                    same_answer(plan.normalizer, text, examples[index].reference or "")
                    for index, text in zip(batch, texts, strict=True)
                )
            steps.advance(len(batch) if counts else 0)
        return group.total(same)[0] / len(examples)


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


def _ends(model: PeftModel, eos: int) -> set[int]:
    """Chat models name more than one end: the tokenizer's, and those of their generation settings."""
    settings = getattr(model.get_base_model(), "generation_config", None)
    named = getattr(settings, "eos_token_id", None)
    return {eos, *(named if isinstance(named, list) else [] if named is None else [named])}
