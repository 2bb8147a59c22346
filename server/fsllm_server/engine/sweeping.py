"""Removing the uploads that are not kept any more: at the commit, at the start, and as time passes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Container
from typing import Final

from fsllm_common.telemetry.logs import get_logger
from fsllm_server.engine.retention import Retention
from fsllm_server.engine.state import Run
from fsllm_server.store.spools import Spools

log = get_logger()

SWEEP_AGAIN: Final = 600.0
"""Seconds between two looks at what retention does not keep any more."""


class Sweeper:
    """Sees to it that the disk holds what retention says."""

    def __init__(
        self, spools: Spools, retention: Retention, find: Callable[[str], Run | None], clock: Callable[[], float]
    ) -> None:
        """Sweep nothing yet.

        Args:
            spools: The uploads.
            retention: What to keep.
            find: Returns a run's state by its id; None when there is no such run.
            clock: Seconds since the epoch.

        """
        self._spools = spools
        self._retention = retention
        self._find = find
        self._clock = clock
        self._urgent: set[asyncio.Task[bool]] = set()
        spools.on_full = self._full

    async def sweep(self, run: str | None = None, retention: Retention | None = None) -> int:
        """Remove the uploads, of a run or of all, that retention does not keep; returns how many folders went."""
        now = self._clock()
        retention = retention or self._retention

        def keeps(run_id: str, round_: int) -> Container[str]:
            return retention.keeps(self._find(run_id), round_, now)

        try:
            return await self._spools.sweep(keeps, run)
        except OSError as error:
            log.warning("uploads that are not kept any more can not be removed yet", why=str(error))
            return 0

    async def make_room(self) -> bool:
        """The disk is full: uploads that are only kept for verifying make way. Returns False when there were none."""
        if removed := await self.sweep(retention=Retention(rounds=0)):
            log.warning("the disk is full: the kept uploads of committed rounds are removed", folders=removed)
        return removed > 0

    async def keep_swept(self) -> None:
        """Remove uploads whose time is over, every now and then; never returns."""
        while True:
            await asyncio.sleep(SWEEP_AGAIN)
            await self.sweep()

    async def settle(self) -> None:
        """Wait until what a full disk has set off is done."""
        await asyncio.gather(*self._urgent)

    def _full(self) -> None:
        task = asyncio.create_task(self.make_room())
        self._urgent.add(task)
        task.add_done_callback(self._urgent.discard)
