"""The local training of one round: an ordinary loop, around whose steps an algorithm's ``LocalRule`` hangs."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING

from fsllm_client.trainer.answers import summed_loss
from fsllm_client.trainer.schedule import learning_rate
from fsllm_common.algorithms import LocalRule
from fsllm_common.errors import FsllmError, TrainingFailed

if TYPE_CHECKING:
    import torch

    from fsllm_client.data.batches import Batch, Step, TrainingBatches
    from fsllm_client.trainer.engine import Engine
    from fsllm_client.trainer.group import Group

Progress = Callable[[int, int, Mapping[str, float]], None]
"""Called with steps done, steps in all, and metrics: as the first step begins, now and then, and after the last."""


@dataclass(slots=True)
class Trained:
    """What a round's training amounts to."""

    delta: dict[str, torch.Tensor]
    """Local minus base, float32, on CPU."""
    tokens: int = 0
    """Answer tokens trained on, over all ranks."""
    steps: int = 0
    metrics: dict[str, float] = field(default_factory=dict)


def changes(rule: LocalRule, hook: str) -> bool:
    """Tell whether the rule has a hook of its own, so that parameters are only gathered for one that looks at them."""
    return getattr(type(rule), hook) is not getattr(LocalRule, hook)


def train_round(
    engine: Engine,
    batches: TrainingBatches,
    *,
    round_number: int,
    steps: int,
    base: Mapping[str, torch.Tensor],
    rule: LocalRule,
    group: Group,
    progress: Progress,
    cancelled: Callable[[], bool],
) -> Trained:
    """Train ``steps`` optimizer steps from ``base``. Call it on every rank.

    The optimizer's state is the caller's concern. Dropout is seeded from the plan's seed, the round and the rank: a
    round that is trained again gives the same delta, and no generator's state need be kept.

    Raises:
        TrainingFailed: LOSS_NOT_FINITE, when loss or gradient is NaN or Inf. The adapter and the optimizer are then
            spoilt: write the one and reset the other before the engine is used again.
        FsllmError: ORDER_UNKNOWN, when cancelled.

    """
    import torch

    torch.manual_seed(_round_seed(engine.plan.seed, round_number, group.rank))
    engine.write_adapter(base)
    rate = learning_rate(engine.plan, round_number)
    engine.set_learning_rate(rate)
    engine.model.train()
    rule.receive(base)
    after_backward = rule.after_backward if changes(rule, "after_backward") else None
    after_step = rule.after_step if changes(rule, "after_step") else None

    progress(0, steps, {})
    tokens, seen, loss_sum = 0, 0, 0.0
    began = reported = time.monotonic()
    for number, step in enumerate(islice(batches, steps), start=1):
        sums: list[torch.Tensor] = []
        norm = engine.step(
            [partial(_pass_loss, engine, rule, batch, step, sums, counts) for batch, counts in _passes(step, engine)],
            after_backward=after_backward,
            after_step=after_step,
        )
        step_sum, wants_end = group.total(float(torch.stack(sums).sum()), float(cancelled()))
        loss = step_sum / max(1, step.answer_tokens)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            what = "gradient" if math.isfinite(loss) else "loss"
            raise TrainingFailed(
                "LOSS_NOT_FINITE", f"round {round_number}, step {number} of {steps}: the {what} is not a finite number"
            )
        if wants_end:
            raise FsllmError("ORDER_UNKNOWN", f"round {round_number} was given up after step {number}")
        tokens, seen, loss_sum = tokens + step.answer_tokens, seen + step.tokens, loss_sum + step_sum
        now = time.monotonic()
        if number == steps or now - reported >= _REPORT_SECONDS:
            reported = now
            speed = seen / (now - began)
            progress(number, steps, {"loss": loss, "learning_rate": rate, "tokens_per_second": speed})

    delta = {name: value - base[name] for name, value in engine.read_adapter().items()}
    if not all(bool(torch.isfinite(tensor).all()) for tensor in delta.values()):
        raise TrainingFailed("LOSS_NOT_FINITE", f"round {round_number}: the last step left the adapter not finite")
    seconds = time.monotonic() - began
    metrics = {
        "train_loss": loss_sum / max(1, tokens),
        "tokens_per_second": seen / seconds,
        "seconds": seconds,
        "learning_rate": rate,
        "gpu_memory_bytes": float(torch.cuda.max_memory_allocated()) if group.device.type == "cuda" else 0.0,
    }
    return Trained(rule.produce(delta), tokens, steps, metrics)


_REPORT_SECONDS = 0.25


def token_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the summed cross entropy, in float32, of the labels that are not -100.

    Args:
        logits: (sequences, virtual tokens + tokens, vocabulary). Prompt and P-tuning put virtual tokens first.
        labels: (sequences, tokens), not shifted: position t is predicted from t - 1.

    """
    import torch

    width = labels.shape[1]
    predicted = logits[:, logits.shape[1] - width : -1].float()
    return torch.nn.functional.cross_entropy(
        predicted.reshape(-1, predicted.shape[-1]), labels[:, 1:].reshape(-1), ignore_index=-100, reduction="sum"
    )


def to_device(inputs: Mapping[str, object], device: torch.device) -> dict[str, object]:
    """Return a batch's inputs with their tensors on the device."""
    import torch

    # Without waiting for the copy: work on a GPU is done in the order in which it is given.
    return {
        name: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
        for name, value in inputs.items()
    }


def _passes(step: Step, engine: Engine) -> list[tuple[Batch, bool]]:
    """Return a step's batches, as many as the engine accumulates; the added ones do not count.

    A site with fewer sequences than the plan's batch has fewer passes a step than its engine was made for.
    """
    batches = [(batch, True) for batch in step.micro_batches]
    return batches + [(step.micro_batches[-1], False)] * (engine.passes - len(batches))


def _pass_loss(
    engine: Engine, rule: LocalRule, batch: Batch, step: Step, sums: list[torch.Tensor], counts: bool
) -> torch.Tensor:
    """Return one pass's part of the step's loss: its tokens' losses over the answer tokens of ALL passes and ranks."""
    inputs = dict(batch.inputs)
    labels: torch.Tensor = inputs.pop("labels")
    inputs = to_device(inputs, engine.device)
    if changes(rule, "loss"):  # it may look at every logit
        labels = labels.to(engine.device)
        logits = engine.forward(**inputs).logits
        loss = token_losses(logits, labels)
        wanted = rule.loss(loss, labels, logits)
    else:
        loss = wanted = summed_loss(*engine.answers(engine.forward, inputs, labels, engine.device))
    if not counts:
        return loss * 0.0
    sums.append(loss.detach().double())
    return wanted / max(1, step.answer_tokens)


def _round_seed(*parts: int) -> int:
    """Return a seed that differs for each (plan seed, round, rank)."""
    import numpy as np

    return int(np.random.SeedSequence(parts).generate_state(1)[0])
