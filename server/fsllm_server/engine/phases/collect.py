"""Collect: the cohort trains and delivers."""

from __future__ import annotations

from typing import ClassVar

from fsllm_server.engine.events import UpdateRecorded
from fsllm_server.engine.phases.init import update_of
from fsllm_server.engine.phases.phase import Phase, complaints, names
from fsllm_server.engine.state import Kind, Order, Run
from fsllm_server.engine.turn import Turn

DEADLINE = "collect"


class Collect(Phase):
    """A site is in the round as long as its TRAIN order is open or its update recorded; otherwise it was dropped."""

    name: ClassVar[str] = "collect"

    def enter(self, turn: Turn) -> None:
        """Send TRAIN to those of the cohort who have not delivered."""
        for site in turn.run.cohort:
            if site not in turn.run.updates:
                turn.send(site, Kind.TRAIN, turn.run.latest)
        if (seconds := turn.run.plan.timing.collect_seconds) is not None:
            turn.set_timer(DEADLINE, seconds)

    def advance(self, turn: Turn) -> str | None:
        """Go on with enough updates, give up when a quorum is out of reach."""
        run = turn.run
        quorum = run.plan.cohort.quorum
        got, pending = len(run.updates), len(run.open_orders(Kind.TRAIN))
        if got + pending < quorum:
            missing = [site for site in run.cohort if site not in run.updates]
            return turn.fail(f"only {got} of the {quorum} updates needed can still come{complaints(run, missing)}")
        if not pending or got >= (run.plan.cohort.size or len(run.cohort)):
            return "reduce"
        if DEADLINE in run.overdue:
            if got >= quorum:
                return "reduce"
            return turn.fail(f"{got} of the {quorum} updates needed after {run.plan.timing.collect_seconds:g} s")
        return None

    def resume(self, turn: Turn) -> str | None:
        """Ask anew: the pause has withdrawn the orders."""
        return "recruit"

    def updated(self, turn: Turn, order: Order, event: UpdateRecorded) -> None:
        """Count the update."""
        if order.kind is Kind.TRAIN:
            turn.update(updates={**turn.run.updates, event.member: update_of(event)})
            turn.update_member(event.member, message="")

    def describe(self, run: Run) -> str:
        """Say how many updates are here, and who still works."""
        pending = [order.member for order in run.open_orders(Kind.TRAIN)]
        return f"{len(run.updates)} of {len(run.updates) + len(pending)} updates; waiting for {names(pending)}"
