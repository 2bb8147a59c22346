"""How long to wait before trying again: exponential, capped, and spread so that sites do not come back all at once."""

import random
from typing import Final

FIRST: Final = 0.2
LONGEST: Final = 5.0


class Backoff:
    """The waits of one series of attempts, in seconds."""

    def __init__(self, first: float = FIRST, longest: float = LONGEST, source: random.Random | None = None) -> None:
        self._first = first
        self._longest = longest
        self._random = source if source is not None else random.Random()  # noqa: S311 - spreads load, guards nothing
        self._next = first

    def wait(self, asked: float | None = None) -> float:
        """Return how long to wait now: half to the whole of the step, at least what the other end ``asked``."""
        step, self._next = self._next, min(self._next * 2, self._longest)
        return max(step * self._random.uniform(0.5, 1.0), asked or 0.0)

    def reset(self) -> None:
        """Begin again: the last attempt went well."""
        self._next = self._first
