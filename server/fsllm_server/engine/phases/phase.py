"""What a phase is. One file a phase; each decides, none acts."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar, Final

from fsllm_server.engine.events import Reduced, ReduceFailed, UpdateRecorded
from fsllm_server.engine.state import Order, Run
from fsllm_server.engine.turn import Turn

GATHER: Final = "gather"
"""The timer of the moment that is given to members who are not here yet, or not here again."""
RECRUIT: Final = "recruit"
"""The timer of the wait for a quorum."""

_COMPLAINTS: Final = 3
"""So many sites are quoted when an attempt fails."""


class Phase:
    """The base of all phases: it has nothing to do and ignores what it does not expect.

    A phase is level-triggered: ``advance`` looks at the state after every event and says what it now allows. So no
    phase depends on the order in which things happen.
    """

    name: ClassVar[str]

    def enter(self, turn: Turn) -> None:
        """Begin: send orders, set timers."""

    def advance(self, turn: Turn) -> str | None:
        """Return the next phase when the time for it has come, else None."""
        return None

    def restart(self, turn: Turn) -> None:
        """Do again what does not survive a restart of the server. Orders and timers are seen to already."""

    def resume(self, turn: Turn) -> str | None:
        """Go on after a pause, which has withdrawn every order: begin again, or return another phase to go on with."""
        self.enter(turn)
        return None

    def updated(self, turn: Turn, order: Order, event: UpdateRecorded) -> None:
        """Count an upload that answers an open order, which is closed by now."""

    def reduced(self, turn: Turn, event: Reduced) -> None:
        """Take the version that a Reduce effect has made."""

    def reduce_failed(self, turn: Turn, event: ReduceFailed) -> None:
        """Learn that a Reduce effect came to nothing."""

    def describe(self, run: Run) -> str:
        """Return what the phase waits for, for people."""
        return ""


def missing(run: Run, present: int, what: str = "") -> str:
    """Return 'waiting for 1 more of 2 sites'."""
    quorum = run.plan.cohort.quorum
    noun = "site" if quorum == 1 else "sites"
    return f"waiting for {max(0, quorum - present)} more of {quorum} {noun}{what}"


def names(members: list[str]) -> str:
    """Return 'a, b, c and 4 more'."""
    shown, rest = members[:5], len(members) - 5
    return ", ".join(shown) + (f" and {rest} more" if rest > 0 else "")


def complaints(run: Run, members: Iterable[str]) -> str:
    """Return ' (a: why; b: why)' of the first of these members who said why; nothing when none did."""
    known = [run.members[name] for name in members if name in run.members]  # one may have been revoked since
    said = [f"{member.name}: {member.message}" for member in known if member.message]
    more = f"; and {len(said) - _COMPLAINTS} more" if len(said) > _COMPLAINTS else ""
    return f" ({'; '.join(said[:_COMPLAINTS])}{more})" if said else ""
