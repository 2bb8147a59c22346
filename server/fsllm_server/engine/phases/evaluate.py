"""Evaluate: sites measure the candidate on their validation splits, evaluators on their held-out files."""

from __future__ import annotations

from typing import ClassVar

from fsllm_server.engine.phases.phase import GATHER, Phase, names
from fsllm_server.engine.rules import ABSENT_ARE_AWAITED
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
    """Measurements are welcome, but no run waits for ever or fails for want of one.

    A server that restarts, or a proxy that does, parts all members at once: those who have gone in this
    round are waited for a moment, or nobody would measure its version.
    """

    name: ClassVar[str] = "evaluate"

    def enter(self, turn: Turn) -> None:
        """Send EVALUATE to all who are ready, attached, and have not measured this version."""
        run = turn.run
        # Only an asynchronous round leaves somebody training: who has no time to measure.
        free = run.members.keys() - run.evaluations.keys() - set(run.training())
        ready = [run.members[name] for name in sorted(free) if run.members[name].standing is Standing.READY]
        for member in ready:
            if member.attached:
                turn.send(member.name, Kind.EVALUATE, run.candidate)
        if run.rules >= ABSENT_ARE_AWAITED:
            turn.update(awaited=frozenset(m.name for m in ready if not m.attached and m.left == run.round))
            if turn.run.awaited:
                turn.set_timer(GATHER, run.plan.timing.gather_seconds)
        turn.set_timer(DEADLINE, run.plan.timing.evaluate_seconds)

    def advance(self, turn: Turn) -> str | None:
        """Go on when all have answered, or the time is up."""
        self._ask_those_who_are_back(turn)
        run = turn.run
        if (run.open_orders(Kind.EVALUATE) or run.awaited) and DEADLINE not in run.overdue:
            return None
        turn.withdraw_all("ROUND_CLOSED", "The time for this evaluation is over", Kind.EVALUATE)
        return "commit"

    @staticmethod
    def _ask_those_who_are_back(turn: Turn) -> None:
        run, members = turn.run, turn.run.members
        back = {name for name in run.awaited if name in members and members[name].attached}
        for name in sorted(back):
            turn.send(name, Kind.EVALUATE, run.candidate)
        absent = frozenset() if GATHER in run.overdue else (run.awaited & members.keys()) - back
        if absent != run.awaited:  # what changes nothing is not recorded
            turn.update(awaited=absent)

    def describe(self, run: Run) -> str:
        """Say who still measures."""
        return f"waiting for {names(sorted({order.member for order in run.open_orders(Kind.EVALUATE)} | run.awaited))}"
