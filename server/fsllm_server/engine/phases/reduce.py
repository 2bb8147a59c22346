"""Reduce: the recorded updates become the next version."""

from __future__ import annotations

from typing import ClassVar

from fsllm_server.engine import effects
from fsllm_server.engine.events import Reduced, ReduceFailed
from fsllm_server.engine.phases.evaluate import evaluation_due
from fsllm_server.engine.phases.phase import Phase
from fsllm_server.engine.staleness import too_stale
from fsllm_server.engine.state import Kind, Run, Version
from fsllm_server.engine.turn import Turn


class Reduce(Phase):
    """The set of updates is fixed from here on: the same set always gives the same bits."""

    name: ClassVar[str] = "reduce"

    def enter(self, turn: Turn) -> None:
        """Close the round to the others and start the reduction."""
        for order in turn.run.open_orders(Kind.TRAIN):
            if too_stale(turn.run, order):
                turn.withdraw(order, "ROUND_CLOSED", f"Round {turn.run.round} has the updates it needs")
        turn.update(job=turn.issue("reduce"))
        self.restart(turn)

    def restart(self, turn: Turn) -> None:
        """Start the same reduction (again)."""
        run = turn.run
        updates = tuple(run.updates[member] for member in sorted(run.updates))
        turn.effects.append(effects.Reduce(run.job, run.round, run.latest, updates))

    def resume(self, turn: Turn) -> str | None:
        """Start the same reduction again."""
        self.restart(turn)
        return None

    def advance(self, turn: Turn) -> str | None:
        """Go on with the version made."""
        run = turn.run
        if run.candidate is None:
            return None
        if run.round == 0:
            return "init"
        return "evaluate" if evaluation_due(run) else "commit"

    def reduced(self, turn: Turn, event: Reduced) -> None:
        """Take the version as the candidate."""
        run = turn.run
        if event.job == run.job and run.candidate is None:
            version = Version(run.round, event.parts, event.state, event.reducer, event.package, event.reducer_version)
            turn.update(candidate=version, zero=run.zero or version, weights=dict(event.weights), job="")

    def reduce_failed(self, turn: Turn, event: ReduceFailed) -> None:
        """Pause: the updates are safe, and somebody has to see to the cause."""
        if event.job == turn.run.job:
            turn.pause(event.reason, event.message)

    def describe(self, run: Run) -> str:
        """Say what is being made."""
        return f"making version {run.round} of {len(run.updates)} updates" if run.round else "publishing version 0"
