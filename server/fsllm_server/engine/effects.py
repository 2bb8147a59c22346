"""What the core asks the shell to do. Doing any of them twice is the same as doing it once."""

from __future__ import annotations

from dataclasses import dataclass

from fsllm_server.engine.events import Metric
from fsllm_server.engine.state import Commit, Order, Update, Version


@dataclass(frozen=True, slots=True)
class SendOrder:
    """Push an order to its member, if it is attached."""

    order: Order


@dataclass(frozen=True, slots=True)
class WithdrawOrder:
    """Tell a member to drop an order."""

    member: str
    order_id: str
    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class SetTimer:
    """Put DeadlinePassed(timer) into the run after so many seconds. Replaces a timer of the same name."""

    timer: str
    seconds: float


@dataclass(frozen=True, slots=True)
class ClearTimer:
    """Forget a timer."""

    timer: str


@dataclass(frozen=True, slots=True)
class Reduce:
    """Make the next version and answer Reduced or ReduceFailed with the same job.

    ``base`` is None for version 0, which is the one update itself.
    """

    job: str
    round: int
    base: Version | None
    updates: tuple[Update, ...]
    """Sorted by member."""


@dataclass(frozen=True, slots=True)
class SweepSpools:
    """A round is over: remove those of the run's uploads that are not to be kept."""


@dataclass(frozen=True, slots=True)
class Notify:
    """Tell those who watch. ``kind`` and ``subject`` are for programs, ``message`` for people."""

    round: int
    kind: str
    subject: str
    message: str
    metrics: tuple[Metric, ...] = ()
    commit: Commit | None = None


Effect = SendOrder | WithdrawOrder | SetTimer | ClearTimer | Reduce | SweepSpools | Notify
