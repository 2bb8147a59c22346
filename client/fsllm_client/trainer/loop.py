"""The local training of one round: an ordinary loop, around whose steps an algorithm's ``LocalRule`` hangs."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fsllm_client.trainer.local_step import EngineStep
from fsllm_client.trainer.schedule import learning_rate
from fsllm_common.algorithms import LocalRule, Turn
from fsllm_common.errors import FsllmError, TrainingFailed

if TYPE_CHECKING:
    import torch

    from fsllm_client.data.batches import Step, TrainingBatches
    from fsllm_client.trainer.engine import Engine
    from fsllm_client.trainer.group import Group
    from fsllm_client.trainer.sharing import Sharing

    Tensors = Mapping[str, torch.Tensor]

Progress = Callable[[int, int, Mapping[str, float]], None]
"""Called with steps done, steps in all, and metrics: as the first step begins, now and then, and after the last."""


@dataclass(slots=True)
class Trained:
    """What a round's training amounts to."""

    delta: dict[str, torch.Tensor]
    """Local minus base, float32, on CPU, of what is sent; and what else the rule sends."""
    own: dict[str, torch.Tensor]
    """The site's personal tensors, float32, on CPU."""
    tokens: int = 0
    """Answer tokens trained on, over all ranks."""
    steps: int = 0
    metrics: dict[str, float] = field(default_factory=dict)


def train_round(
    engine: Engine,
    batches: TrainingBatches,
    *,
    round_number: int,
    steps: int,
    base: Tensors,
    extra: Tensors,
    rule: LocalRule,
    sharing: Sharing,
    group: Group,
    progress: Progress,
    cancelled: Callable[[], bool],
) -> Trained:
    """Train the rule's turns from ``base``: one of ``steps`` optimizer steps, for most rules. Call it on every rank.

    The optimizer's state is the caller's concern, but for turns after the first: these begin with a fresh one. Dropout
    is seeded from the plan's seed, the round and the rank: a round that is trained again gives the same delta, and no
    generator's state need be kept.

    Raises:
        TrainingFailed: LOSS_NOT_FINITE, when loss or gradient is NaN or Inf. The adapter and the optimizer are then
            spoilt: write the one and reset the other before the engine is used again.
        FsllmError: ORDER_UNKNOWN, when cancelled.

    """
    import torch

    torch.manual_seed(_round_seed(engine.plan.seed, round_number, group.rank))
    rate = learning_rate(engine.plan, round_number)
    engine.model.train()
    trained, sent = sharing.trained(round_number), sharing.sent(round_number)
    rule.round, rule.learning_rate, rule.trained, rule.sent = round_number, rate, sorted(trained), sent
    rule.receive(base, extra)

    count = _Count(engine, rule, group, round_number, progress, cancelled)
    coming = iter(batches)

    def left_by(turn: Turn) -> Tensors:
        if count.steps:
            engine.reset_optimizer()
        engine.write_adapter(turn.start)
        engine.freeze(engine.parameters.keys() - (trained if turn.trained is None else trained & turn.trained))
        count.take(turn, coming, rate if turn.learning_rate is None else turn.learning_rate)
        return engine.read_adapter()

    with rule.inside(engine.model, engine.device):
        local = _driven(rule.turns(base, steps), left_by)

    delta = rule.produce({name: local[name] - base[name] for name in sorted(sent)})
    own = {name: local[name] for name in sorted(sharing.personal)}
    left = (*delta.values(), *own.values(), *rule.private.values())
    if not all(bool(torch.isfinite(tensor).all()) for tensor in left):
        raise TrainingFailed("LOSS_NOT_FINITE", f"round {round_number}: the last step left the adapter not finite")
    return Trained(delta, own, count.tokens, count.steps, count.metrics())


def _driven(turns: Generator[Turn, Tensors, Tensors], left_by: Callable[[Turn], Tensors]) -> Tensors:
    """Give each turn what the one before has left, and return what comes of them; there may be none."""
    try:
        turn = next(turns)
        while True:
            turn = turns.send(left_by(turn))
    except StopIteration as end:
        local: Tensors = end.value
        return local


class _Count:
    """Takes a round's steps, and counts them."""

    def __init__(
        self,
        engine: Engine,
        rule: LocalRule,
        group: Group,
        round_number: int,
        progress: Progress,
        cancelled: Callable[[], bool],
    ) -> None:
        self._engine = engine
        self._rule = rule
        self._group = group
        self._rate = 0.0
        self._round = round_number
        self._progress = progress
        self._cancelled = cancelled
        self.steps = 0
        self.tokens = 0
        self._seen = 0
        self._loss_sum = 0.0
        self._began = self._reported = time.monotonic()

    def take(self, turn: Turn, batches: Iterator[Step], rate: float) -> None:
        """Take the steps of one turn.

        Raises:
            TrainingFailed: LOSS_NOT_FINITE.
            FsllmError: ORDER_UNKNOWN, when cancelled.

        """
        self._rate = rate
        self._engine.set_learning_rate(rate)
        last = self.steps + turn.steps
        total = last + turn.following
        self._progress(self.steps, total, {})
        for number in range(1, turn.steps + 1):
            batch = next(batches)
            step = EngineStep(self._engine, self._rule, batch, self._group, number, self._rate)
            self._rule.take_step(step)
            step_sum, wants_end = self._group.total(step.summed or 0.0, float(self._cancelled()))
            loss = step_sum / max(1, batch.answer_tokens)
            if not (math.isfinite(loss) and math.isfinite(step.norm)):
                what = "gradient" if math.isfinite(loss) else "loss"
                raise TrainingFailed(
                    "LOSS_NOT_FINITE",
                    f"round {self._round}, step {self.steps + 1} of {total}: the {what} is not a finite number",
                )
            self.steps += 1
            if wants_end:
                raise FsllmError("ORDER_UNKNOWN", f"round {self._round} was given up after step {self.steps}")
            self.tokens, self._seen = self.tokens + batch.answer_tokens, self._seen + batch.tokens
            self._loss_sum += step_sum
            now = time.monotonic()
            if self.steps == last or now - self._reported >= _REPORT_SECONDS:
                self._reported = now
                speed = self._seen / (now - self._began)
                report = {"loss": loss, "learning_rate": self._rate, "tokens_per_second": speed}
                self._progress(self.steps, total, report)

    def metrics(self) -> dict[str, float]:
        """Return the round's metrics; no loss where nothing was trained on."""
        import torch

        seconds = time.monotonic() - self._began
        cuda = self._group.device.type == "cuda"
        return {
            **({"train_loss": self._loss_sum / self.tokens} if self.tokens else {}),
            "tokens_per_second": self._seen / seconds,
            "seconds": seconds,
            "learning_rate": self._rate,
            "gpu_memory_bytes": float(torch.cuda.max_memory_allocated()) if cuda else 0.0,
        }


_REPORT_SECONDS = 0.25


def _round_seed(*parts: int) -> int:
    """Return a seed that differs for each (plan seed, round, rank)."""
    import numpy as np

    return int(np.random.SeedSequence(parts).generate_state(1)[0])
