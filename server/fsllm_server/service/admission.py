"""Who may upload now. Memory stays bounded because only so many payloads are in flight, however many sites there are.

First come, first served. Those who wait are told their place whenever it changes; nobody polls.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Final

from fsllm_common.telemetry.metrics import ServerMetrics

SIGN_OF_LIFE: Final = 15.0
"""Seconds after which a waiting site is told its place again, so that it knows that the server lives."""


class Admission:
    """A fixed number of upload slots and the queue before them."""

    def __init__(self, slots: int, metrics: ServerMetrics) -> None:
        self._free = slots
        self._queue: deque[Ticket] = deque()
        self._metrics = metrics

    def join(self) -> "Ticket":
        """Stand in the queue; the caller must ``leave`` in the end, whatever happens."""
        ticket = Ticket(self)
        self._queue.append(ticket)
        self._advance()
        return ticket

    def place(self, ticket: "Ticket") -> int:
        """Return the place in the queue, 1 being next; 0 when the ticket holds a slot."""
        return 0 if ticket.admitted else self._queue.index(ticket) + 1

    def release(self, ticket: "Ticket") -> None:
        """Take the ticket out of the queue or its slot back."""
        if ticket.admitted:
            self._free += 1
            self._metrics.uploads_active.dec()
        else:
            self._queue.remove(ticket)
        self._advance()

    def _advance(self) -> None:
        while self._free and self._queue:
            self._free -= 1
            self._metrics.uploads_active.inc()
            first = self._queue.popleft()
            first.admitted = True
            first.changed.set()
        self._metrics.uploads_queued.set(len(self._queue))
        for waiting in self._queue:
            waiting.changed.set()


class Ticket:
    """One upload's place in the queue and then its slot. Use as a context manager."""

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self.admitted = False
        self.changed = asyncio.Event()

    def __enter__(self) -> "Ticket":
        return self

    def __exit__(self, *_: object) -> None:
        self._admission.release(self)

    async def places(self) -> AsyncIterator[int]:
        """Yield the place in the queue when it changes, and every 15 seconds; end when the slot is there."""
        while place := self._admission.place(self):
            self.changed.clear()
            yield place
            with suppress(TimeoutError):
                async with asyncio.timeout(SIGN_OF_LIFE):
                    await self.changed.wait()
