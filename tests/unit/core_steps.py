"""Playing events into the pure core, a step at a time."""

from typing import Any, Literal

from fsllm_common.plan import Plan, canonical_json
from fsllm_server.engine import events
from fsllm_server.engine.core import decide
from fsllm_server.engine.effects import Effect
from fsllm_server.engine.rules import LATEST
from fsllm_server.engine.state import Kind, Order, Run

Outcome = Literal["done", "failed", "declined"]
Role = Literal["site", "evaluator"]


def played(plan: Plan, *happened: events.Event, trains: bool = False) -> tuple[Run, list[Effect]]:
    """Return the state and the last event's effects after these events."""
    text = canonical_json(plan).decode()
    submitted = events.Submitted(at=0, run_id="r", plan=text, needs_trainer=trains, rules=LATEST)
    run, effects = decide(None, submitted)
    for event in happened:
        run, effects = decide(run, event)
    return run, effects


def attach(*members: str, role: Role = "site") -> list[events.Event]:
    return [events.MemberAttached(at=1, member=name, role=role, held=()) for name in members]


def answer_all(run: Run, kind: Kind, outcome: Outcome = "done", **more: Any) -> list[events.Answered]:  # noqa: ANN401
    return [
        events.Answered(at=2, member=o.member, order_id=o.id, outcome=outcome, **more) for o in run.open_orders(kind)
    ]


def go(run: Run, *happened: events.Event) -> Run:
    for event in happened:
        run, _ = decide(run, event)
    return run


def timer(run: Run, purpose: str) -> events.Event:
    return events.DeadlinePassed(at=3, timer=run.timers[purpose].id)


def update(order: Order) -> events.Event:
    return events.UpdateRecorded(
        at=4, member=order.member, order_id=order.id, round=order.round, digest="ab", payload_bytes=8, norm=1.0,
        examples=1, tokens=1, steps=1,
    )  # fmt: skip


def reduced(run: Run) -> events.Event:
    members = sorted(run.updates)
    weights = tuple((name, 1 / len(members)) for name in members)
    return events.Reduced(at=5, job=run.job, parts=(part("d", "m"),), weights=weights)


def part(digest: str, master: str) -> events.Part:
    """Return a version's only part."""
    return events.Part(name="adapter", digest=digest, master=master, payload_bytes=8)


def ready(plan: Plan, *members: str, trains: bool = False) -> Run:
    """Return a run whose version 0 is published and checked by all."""
    run, _ = played(plan, *attach(*members), trains=trains)
    run = go(run, *answer_all(run, Kind.JOIN))
    if "gather" in run.timers:
        run = go(run, timer(run, "gather"))
    run = go(run, update(run.open_orders(Kind.BUILD)[0]))
    run = go(run, reduced(run))
    return go(run, *answer_all(run, Kind.CHECK))
