"""The site's one trainer, and whose turn it is. The worker itself is started, prepared and replaced by ``Trainer``."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from fsllm_client.trainer.orders import Account, Advanced, Finished, Prepare
from fsllm_common.telemetry.logs import get_logger
from fsllm_common.telemetry.metrics import ClientMetrics

if TYPE_CHECKING:
    from fsllm_client.trainer.supervisor import Trainer

log = get_logger()

OnProgress = Callable[[Advanced], None]


class Workshop:
    """Gives the trainer to one order at a time, prepared for its run."""

    def __init__(self, make: "Callable[[], Trainer]", metrics: ClientMetrics) -> None:
        """Start nothing yet.

        Args:
            make: Makes the trainer when the first order needs it.
            metrics: Counts its starts and preparations.

        """
        self._make = make
        self._metrics = metrics
        self._turn = asyncio.Lock()
        self._trainer: Trainer | None = None
        self._noted: Prepare | None = None
        self.finished = Finished()
        """Of the last Prepare: its counts and notes."""

    @asynccontextmanager
    async def prepared(self, prepare: Prepare, on_progress: OnProgress) -> "AsyncIterator[Trainer]":
        """Wait for the trainer's turn and give it, prepared for a run.

        Raises:
            FsllmError: What the trainer says: DATA_INVALID, MODEL_UNSUITABLE, OUT_OF_MEMORY, WORKER_DIED, ...

        """
        async with self._turn:
            if self._trainer is None:
                self._trainer = self._make()
            trainer = self._trainer
            if not trainer.alive:
                self._metrics.trainer_starts.inc()
            before = trainer.prepares
            try:
                self.finished = await trainer.run(prepare, on_progress)
            finally:
                self._metrics.trainer_prepares.inc(trainer.prepares - before)
            if prepare != self._noted:
                self._noted = prepare
                for note in self.finished.notes:
                    log.info("site data", note=note)
            yield trainer

    async def close(self) -> None:
        """End the trainer. Whoever has its turn must have been cancelled before."""
        if self._trainer is not None:
            await self._trainer.stop()


async def account(trainer: "Trainer", multiplier: float, releases: int, delta: float) -> float:
    """Return the epsilon of Gaussian releases, by opacus in the trainer's process."""
    done = await trainer.run(Account(multiplier=multiplier, releases=releases, delta=delta))
    return done.metrics["epsilon"]
