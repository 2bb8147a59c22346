"""Recruit: wait for enough sites and draw the round's cohort."""

from __future__ import annotations

import hashlib
import math
from typing import ClassVar

from fsllm_server.engine.phases.init import GATHER, RECRUIT
from fsllm_server.engine.phases.phase import Phase, missing
from fsllm_server.engine.state import Run, Standing
from fsllm_server.engine.turn import Turn


class Recruit(Phase):
    """Draws from the sites that are ready and attached; those whose update is recorded already count in."""

    name: ClassVar[str] = "recruit"

    def enter(self, turn: Turn) -> None:
        """Ask those again who could not get ready before."""
        turn.update(cohort=())
        turn.nudge_all()
        if (seconds := turn.run.plan.timing.recruit_seconds) is not None:
            turn.set_timer(RECRUIT, seconds)

    def restart(self, turn: Turn) -> None:
        """Give the sites a moment to attach again: the first two back are not the whole federation."""
        turn.set_timer(GATHER, turn.run.plan.timing.gather_seconds)

    def advance(self, turn: Turn) -> str | None:
        """Draw the cohort once a quorum is there."""
        run = turn.run
        ready = [site for site in run.sites(Standing.READY) if site not in run.updates]
        if len(ready) + len(run.updates) < run.plan.cohort.quorum:
            if RECRUIT in run.overdue:
                return turn.fail(
                    f"{missing(run, len(ready) + len(run.updates))} after {run.plan.timing.recruit_seconds:g} s"
                )
            return None
        away = set(run.sites(Standing.READY, attached=False)) - set(ready) - set(run.updates)
        if away and GATHER in run.timers:
            return None
        turn.update(cohort=tuple(sorted([*run.updates, *draw(run, ready)])))
        return "collect"

    def describe(self, run: Run) -> str:
        """Say how many are missing."""
        present = {*run.sites(Standing.READY), *run.updates}
        return missing(run, len(present))


def draw(run: Run, ready: list[str]) -> list[str]:
    """Return the sites to ask: all, or a sample that depends on the plan's seed, the round and the names only.

    The sample is the sites of the smallest hashes, which is uniform and the same on every platform.
    """
    cohort = run.plan.cohort
    if cohort.size is None:
        return ready
    # The small term makes 20 x 1.15 the 23 it is meant to be.
    most = math.floor(cohort.size * cohort.over_selection + 1e-9) - len(run.updates)
    return sorted(ready, key=lambda site: _rank(run, site))[: max(0, most)]


def _rank(run: Run, site: str) -> bytes:
    return hashlib.blake2b(f"{run.plan.seed}/{run.round}/{site}".encode()).digest()
