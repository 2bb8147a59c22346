"""The least pace of a transfer. One timer looks at what has advanced; each chunk costs two additions."""

import asyncio
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Self

from fsllm_common.errors import FsllmError, Unavailable
from fsllm_server.service.guard import Call

GRACE: Final = 2.0
"""Stalls' time before the average counts."""


@dataclass(frozen=True, slots=True)
class PaceLimits:
    """What every transfer must keep up with."""

    stall_seconds: float
    """Without a single chunk."""
    bytes_per_second: float
    """On average since the stream's first byte, after ``GRACE``; 0: any."""


class Pace:
    """Watches one transfer while the context is entered, and ends its call when it is too slow.

    What has arrived stays: the caller goes on at its offset, but has to stand in the queue again.
    """

    def __init__(self, limits: PaceLimits, call: Call) -> None:
        self._limits = limits
        self._call = call
        self._loop = asyncio.get_running_loop()
        self._began = self._last = self._loop.time()
        self._bytes = 0
        self._timer: asyncio.TimerHandle | None = None

    def __enter__(self) -> Self:
        self._look()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def advanced(self, size: int) -> None:
        """Note that ``size`` more bytes have passed."""
        self._bytes += size
        self._last = self._loop.time()

    def _look(self) -> None:
        stalled = self._last + self._limits.stall_seconds
        rate = self._limits.bytes_per_second
        late = self._began + GRACE * self._limits.stall_seconds + self._bytes / rate if rate else stalled
        if self._loop.time() < min(stalled, late):
            self._timer = self._loop.call_at(min(stalled, late), self._look)
        else:
            self._call.end(self._stalled() if stalled <= late else self._trickled())

    def _stalled(self) -> FsllmError:
        message = f"No chunk passed for {self._limits.stall_seconds:g} seconds; the slot goes to the next site"
        return Unavailable("SITE_IDLE", message, retry_after=1.0)

    def _trickled(self) -> FsllmError:
        seconds = self._loop.time() - self._began
        message = (
            f"{self._bytes} bytes in {seconds:.0f} seconds are fewer than the {self._limits.bytes_per_second:g} a "
            "second that hold a slot; what has passed counts, and the transfer goes on from there"
        )
        return Unavailable("TOO_SLOW", message, retry_after=1.0)
