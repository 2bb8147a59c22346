"""The core: an event and a state give the next state and what to do. Pure: no I/O, no clock, no chance.

``decide`` sees to what is the same in every phase (who is there, which orders are open, pause and resume) and then lets
the phase advance as far as the state allows.
"""

from __future__ import annotations

import json
from dataclasses import replace

from fsllm_common.errors import FsllmError
from fsllm_common.plan import Plan
from fsllm_server.engine.effects import Effect, SendOrder, SetTimer, SweepSpools, WithdrawOrder
from fsllm_server.engine.events import (
    Answered,
    Cancelled,
    DeadlinePassed,
    Event,
    MemberAttached,
    MemberDetached,
    MemberForgotten,
    MemberIdle,
    Metric,
    Paused,
    Reduced,
    ReduceFailed,
    Restored,
    Resumed,
    ServerRestarted,
    Submitted,
    UpdateRecorded,
    UpdateRejected,
)
from fsllm_server.engine.phases import PHASES
from fsllm_server.engine.phases.agreement import refuse_other_model
from fsllm_server.engine.phases.init import update_of
from fsllm_server.engine.phases.phase import names
from fsllm_server.engine.rules import LATEST
from fsllm_server.engine.state import Evaluation, Kind, Member, Order, Run, Standing, Status, Update
from fsllm_server.engine.turn import RETRY, Turn

PHASES_THAT_COUNT = ("recruit", "collect", "failed")
"""An update that comes in one of these is of the round in progress; an asynchronous one in any other, of the next."""
PHASES_OF_A_FIXED_SET = ("reduce", "evaluate", "commit")
"""From these a round does not go back: it wants no other update than those that it has."""

RETRY_SECONDS = 30.0
"""After so long a member that could not join, or check version 0, is asked again."""


def decide(run: Run | None, event: Event) -> tuple[Run, list[Effect]]:
    """Return the state after ``event`` and the effects to perform. An event that does not fit is without effect."""
    if run is None:
        if not isinstance(event, Submitted):
            raise FsllmError("STATE_CORRUPT", f"a run's log begins with {event.kind!r} instead of its submission")
        return _submitted(event)
    if run.status.ended:
        return run, []
    turn = Turn(run, event.at)
    _apply(turn, event)
    _settle(turn)
    return turn.run, turn.effects


def check(run: Run, event: Event) -> None:
    """Refuse what somebody asks for and the state does not allow, before it is recorded.

    Raises:
        FsllmError: RUN_ENDED, RUN_NOT_PAUSED; for an update NOT_WANTED, ROUND_CLOSED, UPDATE_CONFLICT or
            MODEL_DIGEST_MISMATCH.

    """
    match event:
        case Paused() | Resumed() | Cancelled() if run.status.ended:
            raise FsllmError("RUN_ENDED", f"Run {run.plan.name} ({run.id}) has ended: {run.status}")
        case Resumed() if run.status is not Status.PAUSED:
            raise FsllmError("RUN_NOT_PAUSED", f"Run {run.plan.name} ({run.id}) is not paused")
        case UpdateRecorded():
            if (before := recorded(run, event.round, event.member)) is not None:
                raise FsllmError(
                    "UPDATE_CONFLICT",
                    f"{event.member} has delivered {before.digest[:12]} for round {event.round} already",
                )
            wanted_order(run, event.member, event.order_id, event.round)
            refuse_other_model(run, event.round, event.member, event.model_digest)


def recorded(run: Run, round_: int, member: str) -> Update | None:
    """Return the update of a member that is recorded for a round, in progress or committed."""
    for waiting in (run.updates, run.early):
        if member in waiting and waiting[member].round == round_:
            return waiting[member]
    # Round r is the commit at index r; an asynchronous update may have been counted in a later one.
    buffer = run.plan.cohort.buffer
    last = round_ + (buffer.max_staleness if buffer is not None else 0)
    return next(
        (
            contribution.update
            for commit in run.commits[round_ : last + 1]
            for contribution in commit.contributions
            if contribution.update.member == member and contribution.update.round == round_
        ),
        None,
    )


def is_over(run: Run, member: str, round_: int) -> bool:
    """Tell whether nobody will ask for a member's result of a round any more, whatever comes."""
    if any(order.round == round_ and order.kind in (Kind.TRAIN, Kind.BUILD) for order in run.orders_of(member)):
        return False
    fixed = run.phase in PHASES_OF_A_FIXED_SET
    return run.status.ended or round_ < run.round or (round_ == run.round and fixed)


def wanted_order(run: Run, member: str, order_id: str, round_: int) -> Order:
    """Return the open order that an upload answers.

    Raises:
        FsllmError: ROUND_CLOSED, NOT_WANTED.

    """
    order = run.orders.get(order_id)
    if (
        order is not None
        and order.member == member
        and order.round == round_
        and order.kind in (Kind.TRAIN, Kind.BUILD)
    ):
        return order
    if round_ < run.round or run.status.ended:
        raise FsllmError("ROUND_CLOSED", f"Round {round_} of run {run.plan.name} is over")
    raise FsllmError("NOT_WANTED", f"Run {run.plan.name} waits for no update of {member} under this order")


def unwanted(run: Run, order_id: str) -> tuple[str, str]:
    """Return reason and message for a member that comes back with an order that is no longer open."""
    number = order_id.split(".")[1] if order_id.count(".") > 1 else ""  # see Turn.issue
    of_run = f"of run {run.plan.name} ({run.id})"
    if not number.isdecimal() or len(number) > 9 or not order_id.startswith(f"{run.id}."):
        return "ORDER_UNKNOWN", f"This is no order {of_run}"
    if run.status.ended:
        return "ROUND_CLOSED", f"Round {number} {of_run} is over, as is the run: {run.status}"
    if int(number) < run.round:
        return "ROUND_CLOSED", f"Round {number} {of_run} is over; round {run.round} is under way"
    return "NOT_WANTED", f"Round {number} {of_run} has gone on without this order"


def _submitted(event: Submitted) -> tuple[Run, list[Effect]]:
    if event.rules > LATEST:
        raise FsllmError("STATE_NEWER", f"it goes by version {event.rules} of the decisions, newer than {LATEST}")
    # Not plan_from_json: what was accepted once is not judged again by a later version's rules.
    plan = Plan.model_validate(json.loads(event.plan))
    run = Run(event.run_id, plan, event.needs_trainer, event.at, event.plan, phase_since=event.at)
    turn = Turn(replace(run, needs_trusted=event.needs_trusted, in_pairs=event.in_pairs, rules=event.rules), event.at)
    turn.notify("status", Status.RUNNING, f"{plan.name} is submitted: {plan.rounds} rounds")
    PHASES[turn.run.phase].enter(turn)
    return turn.run, turn.effects


def _settle(turn: Turn) -> None:
    """Let the phases go on until one has to wait."""
    while turn.run.active:
        following = PHASES[turn.run.phase].advance(turn)
        if following is None:
            return
        _move(turn, following)


def _move(turn: Turn, phase: str) -> None:
    turn.bank_time()
    turn.clear_timers()
    turn.update(phase=phase)
    turn.notify("phase", phase, _entered(turn.run))
    PHASES[phase].enter(turn)


def _entered(run: Run) -> str:
    what = {"collect": f" from {names(list(run.cohort))}", "reduce": f", {PHASES['reduce'].describe(run)}"}
    return f"round {run.round}: {run.phase}{what.get(run.phase, '')}"


def _apply(turn: Turn, event: Event) -> None:
    run = turn.run
    match event:
        case MemberAttached():
            _attached(turn, event)
        case MemberDetached(member=name) if name in run.members:
            turn.update_member(name, attached=False, left=run.round)
            turn.notify("member", name, f"{name} is detached")
        case MemberForgotten(member=name) if name in run.members:
            _forgotten(turn, name)
        case Answered() | MemberIdle():
            order = run.orders.get(event.order_id)
            if order is not None and order.member == event.member:
                _idle(turn, order) if isinstance(event, MemberIdle) else _answered(turn, order, event)
        case UpdateRecorded():
            _updated(turn, event)
        case UpdateRejected():
            turn.notify("rejected", event.member, f"an update of {event.member} was refused: {event.message}")
        case Reduced():
            if run.active:
                PHASES[run.phase].reduced(turn, event)
        case ReduceFailed():
            if run.active:
                PHASES[run.phase].reduce_failed(turn, event)
        case DeadlinePassed():
            _deadline(turn, event.timer)
        case ServerRestarted():
            _restarted(turn)
        case Restored() if event.epoch != run.epoch:
            _restored(turn, event)
        case Paused() if run.active:
            turn.pause("", "paused by an operator")
        case Resumed() if run.status is Status.PAUSED:
            _resumed(turn)
        case Cancelled():
            turn.end(Status.CANCELLED, "RUN_CANCELLED", "cancelled by an operator")
            turn.effects.append(SweepSpools())


# Members.


def _attached(turn: Turn, event: MemberAttached) -> None:
    run, name = turn.run, event.member
    if event.role == "site" and run.plan.cohort.sites is not None and name not in run.plan.cohort.sites:
        return
    if name in run.members:
        turn.update_member(name, attached=True, role=event.role)
        _reconsider(turn, name)
    else:
        turn.update(members={**run.members, name: Member(name, event.role)})
    turn.notify("member", name, f"{name} is attached")
    held = set(event.held)
    for order in turn.run.orders_of(name):
        if order.id not in held:
            turn.effects.append(SendOrder(order))
    for order_id in sorted(held - turn.run.orders.keys()):
        turn.effects.append(WithdrawOrder(name, order_id, *unwanted(turn.run, order_id)))
    turn.nudge(name)


def _reconsider(turn: Turn, name: str) -> None:
    """Ask a member that had declined again: its data, model or policy may have been mended since."""
    if turn.run.members[name].standing is Standing.DECLINED:
        turn.update_member(name, standing=Standing.OFFERED, message="")


def _forgotten(turn: Turn, name: str) -> None:
    for order in turn.run.orders_of(name):
        turn.withdraw(order, "MEMBER_REVOKED", f"{name} is revoked")
    turn.clear_timer(RETRY + name)
    turn.update(members={key: value for key, value in turn.run.members.items() if key != name})
    # What is being reduced or already reduced stays; what only waits to be is not used.
    if turn.run.phase != "reduce" and turn.run.candidate is None:
        turn.update(updates={key: value for key, value in turn.run.updates.items() if key != name})
    turn.update(early={key: value for key, value in turn.run.early.items() if key != name})
    turn.notify("member", name, f"{name} is revoked and out of the run")


def _answered(turn: Turn, order: Order, event: Answered) -> None:
    name = order.member
    turn.close(order)
    _note_epsilon(turn, name, event.metrics)
    if event.outcome == "declined":
        turn.update_member(name, standing=Standing.DECLINED, message=event.message, idle=False)
        for other in turn.run.orders_of(name):
            turn.withdraw(other, "ORDER_UNKNOWN", f"{name} has declined the run")
        turn.notify("member", name, f"{name} declines: {event.message} [{event.reason}]")
    elif event.outcome == "failed":
        _failed(turn, order, event.reason, event.message)
    elif order.kind in (Kind.TRAIN, Kind.BUILD):
        _failed(turn, order, "NOT_WANTED", "ended without an upload")
    else:
        _done(turn, order, event)


def _done(turn: Turn, order: Order, event: Answered) -> None:
    name = order.member
    turn.update_member(name, message="", idle=False)
    match order.kind:
        case Kind.JOIN:
            turn.update_member(name, standing=Standing.JOINED, rank=event.rank)
            turn.notify("member", name, f"{name} has joined")
            turn.nudge(name)
        case Kind.CHECK:
            turn.update_member(name, standing=Standing.READY)
            turn.notify("member", name, f"{name} is ready: its version 0 is the same")
        case Kind.EVALUATE:
            evaluation = Evaluation(name, turn.run.members[name].role, event.metrics)
            turn.update(evaluations={**turn.run.evaluations, name: evaluation})
            number = order.base.number if order.base else 0
            turn.notify("evaluation", name, f"{name} has evaluated version {number}", metrics=event.metrics)


def _failed(turn: Turn, order: Order, reason: str, message: str) -> None:
    """Note that a member could not do an order, which is closed. The phase sees the rest by its absence."""
    name = order.member
    turn.update_member(name, message=f"{order.kind} failed: {message}", idle=False)
    turn.notify("member", name, f"{name} could not {order.kind}: {message} [{reason}]")
    if order.kind is Kind.CHECK and reason == "VERSION_ZERO_MISMATCH":
        turn.update_member(name, standing=Standing.DECLINED, message=message)
    elif order.kind in (Kind.JOIN, Kind.CHECK):
        turn.set_timer(RETRY + name, RETRY_SECONDS)


def _idle(turn: Turn, order: Order) -> None:
    seconds = f"no progress for {turn.run.plan.timing.idle_seconds:g} s"
    if order.kind is Kind.JOIN:
        # A person may have to say yes at the site: the offer stands, but nobody waits for it.
        turn.update_member(order.member, idle=True, message=seconds)
        return
    turn.withdraw(order, "SITE_IDLE", f"{order.kind}: {seconds}")
    _failed(turn, order, "SITE_IDLE", seconds)


def _note_epsilon(turn: Turn, name: str, metrics: tuple[Metric, ...]) -> None:
    for metric in metrics:
        if metric.name == "epsilon":
            turn.update_member(name, epsilon=metric.value)


def _updated(turn: Turn, event: UpdateRecorded) -> None:
    order = turn.run.orders.get(event.order_id)
    if order is None or order.member != event.member or order.round != event.round:
        return
    turn.close(order)
    _note_epsilon(turn, event.member, event.metrics)
    what = "version 0" if order.kind is Kind.BUILD else "its update"
    turn.notify("update", event.member, f"{event.member} has delivered {what}", metrics=event.metrics)
    if order.kind is Kind.TRAIN and turn.run.asynchronous and turn.run.phase not in PHASES_THAT_COUNT:
        turn.update(early={**turn.run.early, event.member: update_of(turn.run, event)})
    else:
        PHASES[turn.run.phase].updated(turn, order, event)


# Time, and the run as a whole.


def _deadline(turn: Turn, timer: str) -> None:
    purpose = next((key for key, value in turn.run.timers.items() if value.id == timer), None)
    if purpose is None:
        return
    turn.clear_timer(purpose)
    if purpose.startswith(RETRY):
        turn.nudge(purpose.removeprefix(RETRY))
    else:
        turn.update(overdue=turn.run.overdue | {purpose})


def _restarted(turn: Turn) -> None:
    for name, member in sorted(turn.run.members.items()):
        if member.attached:
            turn.update_member(name, attached=False, left=turn.run.round)
    turn.notify("status", "restarted", "the server has restarted; members attach again")
    for timer in turn.run.timers.values():
        turn.effects.append(SetTimer(timer.id, timer.seconds))
    if turn.run.active:
        PHASES[turn.run.phase].restart(turn)


def _restored(turn: Turn, event: Restored) -> None:
    """Wait for an operator, and see to it that no name is given out twice: members may know later rounds.

    Orders of the time before are closed. Those to come have the epoch in their names, which members remember.
    """
    turn.pause("RUN_RESTORED", f"restored from the back-up of {event.made}; members may have seen later rounds")
    turn.update(epoch=event.epoch)


def _resumed(turn: Turn) -> None:
    too_few = turn.run.reason == "TOO_FEW_UPDATES"
    turn.update(status=Status.RUNNING, reason="", message="", failures=0, phase_since=turn.at)
    turn.notify("status", Status.RUNNING, "resumed by an operator")
    for name in sorted(turn.run.members):
        _reconsider(turn, name)
    turn.nudge_all()
    # What is here is kept, and whoever is ready by now is asked besides.
    if (phase := "recruit" if too_few else PHASES[turn.run.phase].resume(turn)) is not None:
        _move(turn, phase)
