"""Those who watch a run: recorded notices first, then live ones, each exactly once and in order."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

from fsllm.v1 import control_pb2
from fsllm_common.errors import FsllmError

PROGRESS_BACKLOG = 256
"""A watcher with so many messages unread gets no more live progress until it has caught up."""

Notices = list[control_pb2.WatchRunResponse]
_Queue = asyncio.Queue[control_pb2.WatchRunResponse | FsllmError | None]


class Watchers:
    """The live streams of one run."""

    def __init__(self) -> None:
        self._queues: set[_Queue] = set()
        self._closed = False
        self._error: FsllmError | None = None

    def tell(self, notice: control_pb2.WatchRunResponse) -> None:
        """Send to all. Live progress (sequence 0) is left out for those who lag."""
        for queue in self._queues:
            if notice.sequence or queue.qsize() < PROGRESS_BACKLOG:
                queue.put_nowait(notice)

    def close(self, error: FsllmError | None = None) -> None:
        """End the streams once they have said what is queued: the run has ended or, with an error, the server stops."""
        if not self._closed:
            self._closed, self._error = True, error
            for queue in self._queues:
                queue.put_nowait(error)

    async def stream(
        self, after: int, recorded: Callable[[], Awaitable[Notices]]
    ) -> AsyncIterator[control_pb2.WatchRunResponse]:
        """Yield the recorded notices after ``after``, then live ones, until ``close``.

        Args:
            after: The last sequence that the caller knows; 0: none.
            recorded: Reads all notices back from the log.

        Raises:
            FsllmError: The error of ``close``.

        """
        queue: _Queue = asyncio.Queue()
        self._queues.add(queue)
        try:
            if self._closed:
                queue.put_nowait(self._error)
            for notice in await recorded():
                if notice.sequence > after:
                    after = notice.sequence
                    yield notice
            while (live := await queue.get()) is not None:
                if isinstance(live, FsllmError):
                    raise live
                # What was recorded while the log was read comes twice: there and here.
                if live.sequence == 0 or live.sequence > after:
                    after = max(after, live.sequence)
                    yield live
        finally:
            self._queues.discard(queue)
