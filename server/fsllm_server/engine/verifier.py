"""Verifications off the event loop: one at a time, in a thread that gives way to everything else."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

from fsllm_server.engine.state import Run
from fsllm_server.engine.verifying import Finding, Progress, Verification
from fsllm_server.reduce import Stopped
from fsllm_server.store.blobs import Blobs
from fsllm_server.store.events import Entry
from fsllm_server.store.spools import Spools


class Verifier:
    """Starts a thread with the first verification."""

    def __init__(self, blobs: Blobs, spools: Spools) -> None:
        self._blobs = blobs
        self._spools = spools
        self._threads: ThreadPoolExecutor | None = None
        self._ended = threading.Event()

    async def verify(
        self, run: Run, recorded: Sequence[str], entries: Sequence[Entry], rounds: range
    ) -> AsyncGenerator[Progress | Finding]:
        """Yield progress, and a finding for each of these rounds; what is being read is kept meanwhile.

        Args:
            run: As memory has it.
            recorded: The digests of its rounds' manifests, likewise.
            entries: Its log, as it was just read.
            rounds: Which of those it has committed.

        """
        if self._threads is None:
            self._threads = ThreadPoolExecutor(1, "verify", initializer=_give_way)
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[Progress | Finding | None] = asyncio.Queue()
        left = threading.Event()

        def tell(what: Progress | Finding | None) -> None:
            loop.call_soon_threadsafe(queue.put_nowait, what)

        def stopped() -> bool:
            return left.is_set() or self._ended.is_set()

        verification = Verification(entries, run, recorded, self._blobs, self._spools, tell, stopped)
        with ExitStack() as pins:
            for round_ in rounds:
                pins.enter_context(self._spools.pinned(run.id, round_))
            work = loop.run_in_executor(self._threads, _work, verification, rounds, tell, stopped)
            try:
                while (what := await queue.get()) is not None:
                    yield what
            finally:
                left.set()
                await asyncio.wait([work])
            work.result()

    def stop(self) -> None:
        """End what goes on, at the next block."""
        self._ended.set()


def _work(
    verification: Verification,
    rounds: range,
    tell: Callable[[Finding | None], None],
    stopped: Callable[[], bool],
) -> None:
    try:
        if not stopped():
            for finding in verification.findings(rounds):
                tell(finding)
    except Stopped:
        pass
    finally:
        tell(None)


def _give_way() -> None:
    """Let this thread run when no other wants to; Linux has a priority for each."""
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
