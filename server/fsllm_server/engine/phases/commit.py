"""Commit: the candidate becomes the run's next version, for ever."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from fsllm_common.round_manifest import digest
from fsllm_server.engine import state
from fsllm_server.engine.effects import SweepSpools
from fsllm_server.engine.manifests import manifest_of
from fsllm_server.engine.phases.phase import Phase
from fsllm_server.engine.state import Contribution, Status
from fsllm_server.engine.turn import Turn


class Commit(Phase):
    """Takes no time."""

    name: ClassVar[str] = "commit"

    def advance(self, turn: Turn) -> str | None:
        """Commit, and go on with the next round or end the run."""
        run = turn.run
        if run.candidate is None:
            raise AssertionError("the phase is entered with a candidate")
        previous = run.commits[-1].manifest if run.commits else None
        commit = state.Commit(
            round=run.round,
            version=run.candidate,
            at=turn.at,
            contributions=tuple(Contribution(run.updates[m], run.weights[m]) for m in sorted(run.weights)),
            evaluations=tuple(run.evaluations[m] for m in sorted(run.evaluations)),
            phase_seconds=tuple(sorted(run.phase_seconds.items())),
            epoch=run.epoch,
        )
        commit = replace(commit, manifest=digest(manifest_of(run, commit, previous)))
        turn.update(
            commits=(*run.commits, commit),
            candidate=None,
            updates=run.early,
            early={},
            weights={},
            evaluations={},
            awaited=frozenset(),
            cohort=(),
            failures=0,
            phase_seconds={},
        )
        turn.notify("commit", str(run.round), f"version {run.round} is committed", commit=commit)
        turn.effects.append(SweepSpools())
        if run.round == run.plan.rounds:
            turn.end(Status.DONE, "ROUND_CLOSED", f"done after {run.plan.rounds} rounds")
            return None
        turn.update(round=run.round + 1)
        return "recruit"
