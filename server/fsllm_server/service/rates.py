"""How often one member, or one address, may do something."""

import time
from collections.abc import Callable, Mapping
from typing import Final

from fsllm_common.errors import Unavailable

MAX_NAMES: Final = 10_000
"""Names that are remembered; the one that has been quiet the longest is forgotten first, to its advantage."""

COSTS: Final[Mapping[str, int]] = {"Attach": 10, "Renew": 60, "Upload": 4}
"""What a call of a method counts for; any other counts for 1. These three are recorded on disk."""

REFUSED: Final = 10
"""What a call counts for besides, when it is refused."""


class Rate:
    """A token bucket for each name: a steady rate, and a minute's worth at once (or ``burst``)."""

    def __init__(
        self, per_second: float, burst: float | None = None, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._per_second = per_second
        self._burst = burst if burst is not None else per_second * 60
        self._clock = clock
        self._filled: dict[str, tuple[float, float]] = {}
        """By name, the longest quiet first: tokens (less than none after ``charge``) and when there were so many."""

    def charge(self, name: str, tokens: float = 1) -> None:
        """Take tokens, whether they are there or not."""
        self._keep(name, self._level(name) - tokens)

    def wait(self, name: str, tokens: float = 1) -> float:
        """Take tokens if they are there and return 0; else take none and return the seconds until they are."""
        level = self._level(name)
        if level >= min(tokens, self._burst):
            self._keep(name, level - tokens)
            return 0.0
        return (min(tokens, self._burst) - level) / self._per_second

    def _level(self, name: str) -> float:
        now = self._clock()
        level, then = self._filled.get(name, (self._burst, now))
        return min(self._burst, level + (now - then) * self._per_second)

    def _keep(self, name: str, level: float) -> None:
        self._filled.pop(name, None)
        self._filled[name] = level, self._clock()
        if len(self._filled) > MAX_NAMES:
            del self._filled[next(iter(self._filled))]


class CallRate:
    """Calls a minute of each member. What is recorded on disk counts for more, and so does what was refused."""

    def __init__(self, per_minute: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_minute = per_minute
        self._rate = Rate(per_minute / 60, clock=clock)

    def enter(self, member: str, method: str) -> None:
        """Count a call.

        Raises:
            Unavailable: QUOTA_EXCEEDED, with when to try again.

        """
        if wait := self._rate.wait(member, COSTS.get(method.rpartition("/")[2], 1)):
            message = f"{member} calls too often: {self._per_minute} calls a minute are allowed (--calls-per-minute)"
            raise Unavailable("QUOTA_EXCEEDED", message, retry_after=max(1.0, wait))

    def refused(self, member: str) -> None:
        """Count a refusal."""
        self._rate.charge(member, REFUSED)
