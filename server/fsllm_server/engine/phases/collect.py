"""Collect: the cohort trains and delivers."""

from __future__ import annotations

from typing import ClassVar

from fsllm_server.engine.events import UpdateRecorded
from fsllm_server.engine.phases.agreement import drop_odd_ones_out
from fsllm_server.engine.phases.init import update_of
from fsllm_server.engine.phases.phase import Phase, complaints, names
from fsllm_server.engine.state import Kind, Order, Run, Standing
from fsllm_server.engine.turn import Turn

DEADLINE = "collect"


class Collect(Phase):
    """A site is in the round as long as its TRAIN order is open or its update recorded; otherwise it was dropped."""

    name: ClassVar[str] = "collect"

    def enter(self, turn: Turn) -> None:
        """Send TRAIN to those of the cohort who have not delivered."""
        self._ask(turn)
        if (seconds := turn.run.plan.timing.collect_seconds) is not None:
            turn.set_timer(DEADLINE, seconds)

    def advance(self, turn: Turn) -> str | None:
        """Go on with enough updates, give up when a quorum is out of reach."""
        if turn.run.asynchronous:
            self._ask(turn)
        run = turn.run
        quorum = run.quorum
        trusted = [member for member, update in run.updates.items() if update.trusted]
        got, pending = len(run.updates) - len(trusted), len(run.open_orders(Kind.TRAIN))
        if run.needs_trusted and not trusted:
            asked = [name for name in run.training() if name in run.trusted()]
            if not asked:
                return turn.fail("no evaluator's update can still come to compare with")
            if DEADLINE not in run.overdue:
                return None
        if got + pending < quorum:
            missing = [site for site in run.cohort if site not in run.updates]
            return turn.fail(f"only {got} of the {quorum} updates needed can still come{complaints(run, missing)}")
        if not pending or got >= wanted(run) or (DEADLINE in run.overdue and got >= quorum):
            if not drop_odd_ones_out(turn):
                return "reduce"
            return self.advance(turn) if turn.run.active else None
        if DEADLINE in run.overdue:
            return turn.fail(f"{got} of the {quorum} updates needed after {run.plan.timing.collect_seconds:g} s")
        return None

    @staticmethod
    def _ask(turn: Turn) -> None:
        """Send TRAIN to the cohort, and to those who are compared with; an asynchronous round's is whoever is there."""
        run = turn.run
        cohort = run.sites(Standing.READY) if run.asynchronous else run.cohort
        for name in (*cohort, *run.trusted()):
            if name not in run.updates and name not in turn.run.training():
                turn.send(name, Kind.TRAIN, run.latest)

    def resume(self, turn: Turn) -> str | None:
        """Ask anew: the pause has withdrawn the orders."""
        return "recruit"

    def updated(self, turn: Turn, order: Order, event: UpdateRecorded) -> None:
        """Count the update."""
        if order.kind is Kind.TRAIN:
            turn.update(updates={**turn.run.updates, event.member: update_of(turn.run, event)})
            turn.update_member(event.member, message="")

    def describe(self, run: Run) -> str:
        """Say how many updates are here, and who still works."""
        pending = [order.member for order in run.open_orders(Kind.TRAIN)]
        return f"{len(run.updates)} of {len(run.updates) + len(pending)} updates; waiting for {names(pending)}"


def wanted(run: Run) -> int:
    """Return how many updates make the round, if they come."""
    cohort = run.plan.cohort
    return cohort.buffer.size if cohort.buffer is not None else cohort.size or len(run.cohort)
