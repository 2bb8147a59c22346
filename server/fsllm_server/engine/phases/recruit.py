"""Recruit: wait for enough sites and draw the round's cohort."""

from __future__ import annotations

import hashlib
import math
from typing import ClassVar

from fsllm_server.engine.phases.phase import GATHER, RECRUIT, Phase, missing, names
from fsllm_server.engine.rules import ABSENT_ARE_AWAITED
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
        if turn.run.rules >= ABSENT_ARE_AWAITED and away(turn.run):
            self.restart(turn)

    def restart(self, turn: Turn) -> None:
        """Give the sites a moment to attach again: the first two back are not the whole federation."""
        turn.set_timer(GATHER, turn.run.plan.timing.gather_seconds)

    def advance(self, turn: Turn) -> str | None:
        """Draw the cohort once a quorum is there."""
        run = turn.run
        if run.needs_trusted and not run.trusted():
            overdue = RECRUIT in run.overdue
            return turn.fail("no evaluator is there to compare the sites' updates with") if overdue else None
        if run.completed(run.round):
            return self._same_again(turn)
        ready = [site for site in run.sites(Standing.READY) if site not in run.updates]
        if len(ready) + len(run.updates) < run.plan.cohort.quorum:
            if RECRUIT in run.overdue:
                return turn.fail(
                    f"{missing(run, len(ready) + len(run.updates))} after {run.plan.timing.recruit_seconds:g} s"
                )
            return None
        if away(run) and GATHER in run.timers:
            return None
        turn.update(cohort=tuple(sorted([*run.updates, *draw(run, ready)])))
        return "collect"

    @staticmethod
    def _same_again(turn: Turn) -> str | None:
        """Ask those whose updates this round completes, once all of them are here: the others have nothing to say."""
        run = turn.run
        asked = sorted(run.completed(run.round).keys() & run.members.keys())
        if not asked:
            return turn.fail(f"nobody is left whose part of round {run.round - 1} this round would complete")
        if absent(run):
            return turn.fail(waits_for_the_same(run)) if RECRUIT in run.overdue else None
        turn.update(cohort=tuple(asked))
        return "collect"

    def describe(self, run: Run) -> str:
        """Say how many are missing, or who."""
        present = {*run.sites(Standing.READY), *run.updates}
        if run.needs_trusted and not run.trusted():
            return "waiting for an evaluator, with whose update the sites' are compared"
        return waits_for_the_same(run) if absent(run) else missing(run, len(present))


def away(run: Run) -> set[str]:
    """Return the sites that may be back in a moment: they were ready, and have gone in this round or the last."""
    gone = set(run.sites(Standing.READY, attached=False)) - set(run.sites(Standing.READY)) - set(run.updates)
    if run.rules < ABSENT_ARE_AWAITED:
        return gone
    return {name for name in gone if (left := run.members[name].left) is not None and left >= run.round - 1}


def absent(run: Run) -> list[str]:
    """Return those who are not here, of those whose updates this round completes, sorted. A revoked one is not missed.

    The round's version then lacks what that one's half would have completed.
    """
    here = {*run.sites(Standing.READY), *run.updates}
    return sorted((run.completed(run.round).keys() & run.members.keys()) - here)


def waits_for_the_same(run: Run) -> str:
    """Say who is missed, and what can be done about it."""
    whose = f"whose part of round {run.round - 1} this round completes"
    return f"waiting for {names(absent(run))}, {whose} (a site that is revoked is done without)"


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
