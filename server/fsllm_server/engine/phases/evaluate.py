"""Evaluate: sites measure the candidate on their validation splits, evaluators on their held-out files."""

from __future__ import annotations

from typing import ClassVar

from fsllm_server.engine.phases.phase import Phase, names
from fsllm_server.engine.state import Kind, Run, Standing
from fsllm_server.engine.turn import Turn

DEADLINE = "evaluate"


def evaluation_due(run: Run) -> bool:
    """Is the round's version to be evaluated?"""
    every = run.plan.evaluate.every
    if not run.needs_trainer or every == 0:
        return False
    return run.plan.evaluate.base if run.round == 0 else run.round % every == 0 or run.round == run.plan.rounds


class Evaluate(Phase):
    """Measurements are welcome, but no run waits for ever or fails for want of one."""

    name: ClassVar[str] = "evaluate"

    def enter(self, turn: Turn) -> None:
        """Send EVALUATE to all who are ready, attached, and have not measured this version."""
        for member in sorted(turn.run.members.values(), key=lambda m: m.name):
            if member.attached and member.standing is Standing.READY and member.name not in turn.run.evaluations:
                turn.send(member.name, Kind.EVALUATE, turn.run.candidate)
        turn.set_timer(DEADLINE, turn.run.plan.timing.evaluate_seconds)

    def advance(self, turn: Turn) -> str | None:
        """Go on when all have answered, or the time is up."""
        if turn.run.open_orders(Kind.EVALUATE) and DEADLINE not in turn.run.overdue:
            return None
        turn.withdraw_all("ROUND_CLOSED", "The time for this evaluation is over", Kind.EVALUATE)
        return "commit"

    def describe(self, run: Run) -> str:
        """Say who still measures."""
        return f"waiting for {names([order.member for order in run.open_orders(Kind.EVALUATE)])}"
