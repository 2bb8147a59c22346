"""Init: sites join, one of them builds version 0, the others check it against their own."""

from __future__ import annotations

from typing import ClassVar

from fsllm_server.engine.events import UpdateRecorded
from fsllm_server.engine.phases.evaluate import evaluation_due
from fsllm_server.engine.phases.phase import GATHER, RECRUIT, Phase, complaints, missing, names
from fsllm_server.engine.state import Kind, Order, Run, Standing, Update
from fsllm_server.engine.turn import Turn


class Init(Phase):
    """Left once, when version 0 is there and nobody is checking it any more."""

    name: ClassVar[str] = "init"

    def enter(self, turn: Turn) -> None:
        """Offer the run, or the check of version 0, to all who are here."""
        turn.nudge_all()
        seconds = turn.run.plan.timing.recruit_seconds
        if turn.run.zero is None and seconds is not None:
            turn.set_timer(RECRUIT, seconds)

    def advance(self, turn: Turn) -> str | None:
        """Gather sites; ask one after the other to build, until one has; wait for the checks."""
        run = turn.run
        if run.zero is not None:
            if run.open_orders(Kind.CHECK) or _evaluators_on_their_way(run):
                return None
            return "evaluate" if evaluation_due(run) else "commit"
        if run.updates:
            return "reduce"
        if run.open_orders(Kind.BUILD):
            return None
        joined = run.sites(Standing.JOINED)
        if len(joined) < run.plan.cohort.quorum:
            if RECRUIT in run.overdue:
                return turn.fail(f"{missing(run, len(joined))} to join after {run.plan.timing.recruit_seconds:g} s")
            return None
        if GATHER not in run.overdue and set(joined) != set(run.plan.cohort.sites or ()):
            if GATHER not in run.timers:
                turn.set_timer(GATHER, run.plan.timing.gather_seconds)
            return None
        able = [site for site in joined if site not in run.builders]
        if not able:
            if _on_their_way(run, sites=True):
                return None  # one of them may be able to
            return turn.fail(f"no site could build version 0{complaints(run, run.builders)}")
        turn.clear_timers()
        turn.update(builders=(*run.builders, able[0]), overdue=frozenset({GATHER}))
        turn.send(able[0], Kind.BUILD)
        return None

    def resume(self, turn: Turn) -> str | None:
        """Begin again, with every site as a possible builder."""
        turn.update(builders=())
        self.enter(turn)
        return None

    def updated(self, turn: Turn, order: Order, event: UpdateRecorded) -> None:
        """Take the builder's tensors as version 0."""
        if order.kind is Kind.BUILD:
            turn.update(updates={event.member: update_of(turn.run, event)}, adapter_config=event.adapter_config)
            turn.update_member(event.member, standing=Standing.READY, message="")

    def describe(self, run: Run) -> str:
        """Say who is waited for."""
        if checking := run.open_orders(Kind.CHECK):
            return f"waiting for {names([order.member for order in checking])} to check version 0"
        if building := run.open_orders(Kind.BUILD):
            return f"waiting for {building[0].member} to build version 0"
        return f"{missing(run, len(run.sites(Standing.JOINED)))} to join"


def update_of(run: Run, event: UpdateRecorded) -> Update:
    """Return what the state keeps of a recorded update."""
    member = run.members.get(event.member)
    return Update(
        event.member,
        event.round,
        event.digest,
        event.payload_bytes,
        event.examples,
        event.tokens,
        event.steps,
        event.metrics,
        event.element_type,
        trusted=member is not None and not member.is_site,
        model_digest=event.model_digest,
    )


def _evaluators_on_their_way(run: Run) -> bool:
    """Without its evaluator a run would never know how good the base model was."""
    return evaluation_due(run) and _on_their_way(run, sites=False)


def _on_their_way(run: Run, *, sites: bool) -> bool:
    """Is any site (any evaluator) that is attached and has not gone quiet still joining?"""
    joining = (run.members[order.member] for order in run.open_orders(Kind.JOIN))
    return any(member.is_site is sites and member.attached and not member.idle for member in joining)
