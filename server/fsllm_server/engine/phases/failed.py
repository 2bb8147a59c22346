"""Failed: an attempt at a round came to nothing. It says what is kept, and tries again or asks for help."""

from __future__ import annotations

from typing import ClassVar

from fsllm_server.engine.phases.phase import Phase, names
from fsllm_server.engine.state import Kind
from fsllm_server.engine.turn import Turn


class Failed(Phase):
    """Kept: the updates recorded, for the base stays the same. Thrown away: the work still under way."""

    name: ClassVar[str] = "failed"

    def enter(self, turn: Turn) -> None:
        """Withdraw what is under way; after too many failures in a row, pause."""
        run = turn.run
        turn.withdraw_all("ROUND_CLOSED", f"This attempt at round {run.round} has failed", Kind.TRAIN, Kind.BUILD)
        turn.update(failures=run.failures + 1, builders=())
        kept = f"kept: {names(sorted(run.updates))}" if run.updates else "nothing was delivered"
        turn.notify("failure", self.name, f"round {run.round} failed: {run.failure} ({kept})")
        if turn.run.failures >= run.plan.timing.failed_rounds:
            count = turn.run.failures
            times = "once" if count == 1 else f"{count} times in a row"
            turn.pause("QUORUM_NOT_REACHED", f"round {run.round} failed {times}, at last: {run.failure}")

    def advance(self, turn: Turn) -> str | None:
        """Try again."""
        return "recruit" if turn.run.commits else "init"

    def resume(self, turn: Turn) -> str | None:
        """Try again."""
        return None
