"""The pure core, played with random events: what must hold in every state, and that no state is a dead end."""

import json
import math
from typing import Any, Literal

import pytest
from engine_harness import make_plan
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from fsllm_common.errors import FsllmError
from fsllm_common.plan import Plan, canonical_json
from fsllm_server.engine import events
from fsllm_server.engine.core import check, decide
from fsllm_server.engine.effects import ClearTimer, Effect, Notify, Reduce, SendOrder, SetTimer, WithdrawOrder
from fsllm_server.engine.phases import PHASES
from fsllm_server.engine.phases.recruit import draw
from fsllm_server.engine.state import Kind, Member, Order, Run, Standing, Status

Outcome = Literal["done", "failed", "declined"]
Role = Literal["site", "evaluator"]

SITES = ["a", "b", "c", "d"]
MEMBERS = [*SITES, "judge"]


class World(RuleBasedStateMachine):
    """A shell that performs effects on paper and lets anything happen at any time."""

    run: Run

    @initialize(
        quorum=st.integers(1, 3),
        size=st.sampled_from([None, 1, 2, 3]),
        over=st.sampled_from([1.0, 1.5, 2.0]),
        sites=st.sampled_from([None, ("a", "b", "c")]),
        trains=st.booleans(),
        deadlines=st.booleans(),
    )
    def submit(
        self, quorum: int, size: int | None, over: float, sites: tuple[str, ...] | None, trains: bool, deadlines: bool
    ) -> None:
        if size is not None:
            quorum = min(quorum, size)
        seconds = {"recruit_seconds": 60.0, "collect_seconds": 60.0} if deadlines else {}
        plan = make_plan(
            cohort={"quorum": quorum, "size": size, "over_selection": over, "sites": sites},
            timing={"failed_rounds": 2, **seconds},
        )
        self.clock = 0.0
        self.log: list[str] = []
        self.timers: dict[str, float] = {}
        self.jobs: dict[str, Reduce] = {}
        self.hands: dict[str, dict[str, Order]] = {name: {} for name in MEMBERS}
        """What each daemon has been sent and not been told to drop."""
        self.recorded: dict[tuple[int, str], str] = {}
        """Acknowledged updates by round and member, less those of revoked members."""
        text = canonical_json(plan).decode()
        self.run, effects = decide(None, events.Submitted(at=0.0, run_id="r", plan=text, needs_trainer=trains))
        self.log.append(events.dump(events.Submitted(at=0.0, run_id="r", plan=text, needs_trainer=trains)))
        self.perform(effects)

    # What can happen.

    @rule(name=st.sampled_from(MEMBERS), keep=st.booleans())
    def attach(self, name: str, keep: bool) -> None:
        held = tuple(sorted(self.hands[name])) if keep else ()
        if not keep:
            self.hands[name] = {}
        role: Role = "evaluator" if name == "judge" else "site"
        self.put(events.MemberAttached(at=self.now(), member=name, role=role, held=held))

    @rule(name=st.sampled_from(MEMBERS))
    def detach(self, name: str) -> None:
        self.put(events.MemberDetached(at=self.now(), member=name))

    @rule(
        data=st.data(),
        outcome=st.sampled_from(["done", "done", "done", "failed", "declined"]),
        reason=st.sampled_from(["WORKER_DIED", "VERSION_ZERO_MISMATCH"]),
    )
    @precondition(lambda self: any(self.hands.values()))
    def answer(self, data: st.DataObject, outcome: Outcome, reason: str) -> None:
        order = data.draw(st.sampled_from(self.in_hand()))
        self.hands[order.member].pop(order.id)
        self.put(
            events.Answered(
                at=self.now(), member=order.member, order_id=order.id, outcome=outcome, reason=reason, message="m"
            )
        )

    @rule(data=st.data(), digest=st.sampled_from(["aa", "bb"]))
    @precondition(lambda self: any(self.hands.values()))
    def upload(self, data: st.DataObject, digest: str) -> None:
        order = data.draw(st.sampled_from(self.in_hand()))
        self.deliver(order, digest)

    @rule(data=st.data())
    @precondition(lambda self: self.jobs)
    def reduction_ends(self, data: st.DataObject) -> None:
        self.reduced(data.draw(st.sampled_from(sorted(self.jobs))))

    @rule(data=st.data())
    @precondition(lambda self: self.jobs)
    def reduction_fails(self, data: st.DataObject) -> None:
        job = data.draw(st.sampled_from(sorted(self.jobs)))
        self.jobs.pop(job)
        self.put(events.ReduceFailed(at=self.now(), job=job, reason="DISK_FULL", message="full"))

    @rule(data=st.data())
    @precondition(lambda self: self.timers)
    def time_passes(self, data: st.DataObject) -> None:
        self.deadline(data.draw(st.sampled_from(sorted(self.timers))))

    @rule()
    def a_stale_timer(self) -> None:
        before = self.run
        self.put(events.DeadlinePassed(at=self.now(), timer="r.0.gather.0"))
        assert self.run == before

    @rule(data=st.data())
    @precondition(lambda self: self.run.orders)
    def idle(self, data: st.DataObject) -> None:
        order = self.run.orders[data.draw(st.sampled_from(sorted(self.run.orders)))]
        self.put(events.MemberIdle(at=self.now(), member=order.member, order_id=order.id))

    @rule()
    def restart(self) -> None:
        self.timers, self.jobs = {}, {}
        self.put(events.ServerRestarted(at=self.now()))

    @rule()
    def pause(self) -> None:
        self.put(events.Paused(at=self.now()))

    @rule()
    def resume(self) -> None:
        self.put(events.Resumed(at=self.now()))

    @rule(name=st.sampled_from(MEMBERS), really=st.integers(0, 3))
    def forget(self, name: str, really: int) -> None:
        if really == 0:
            if self.run.candidate is None and self.run.phase not in ("reduce", ""):
                self.recorded.pop((self.run.round, name), None)
            self.put(events.MemberForgotten(at=self.now(), member=name))

    @rule(really=st.integers(0, 9))
    def cancel(self, really: int) -> None:
        if really == 0:
            self.put(events.Cancelled(at=self.now()))

    @rule(steps=st.integers(1, 12))
    def all_is_well(self, steps: int) -> None:
        """Without this, chance would hardly ever bring a run past its first round."""
        for name in ("a", "b", "judge"):
            member = self.run.members.get(name)
            if member is None or not member.attached:
                self.attach(name, keep=True)
        for _ in range(steps):
            self.one_good_step(timers="gather" in self.run.timers)

    # How it is done.

    def one_good_step(self, *, timers: bool) -> None:
        """Let a member do what it was told, or a reduction end, or else time pass."""
        if self.in_hand():
            order = self.in_hand()[0]
            self.hands[order.member].pop(order.id)
            if order.kind in (Kind.TRAIN, Kind.BUILD):
                self.deliver(order, "cc")
            else:
                self.put(events.Answered(at=self.now(), member=order.member, order_id=order.id, outcome="done"))
        elif self.jobs:
            self.reduced(min(self.jobs))
        elif timers and self.timers:
            self.deadline(min(self.timers))

    def now(self) -> float:
        self.clock += 1.0
        return self.clock

    def in_hand(self) -> list[Order]:
        return sorted((o for hand in self.hands.values() for o in hand.values()), key=lambda order: order.id)

    def deliver(self, order: Order, digest: str) -> None:
        event = events.UpdateRecorded(
            at=self.now(),
            member=order.member,
            order_id=order.id,
            round=order.round,
            digest=digest,
            payload_bytes=8,
            norm=1.0,
            examples=3,
            tokens=30,
            steps=1,
        )
        if self.put(event):
            assert (order.round, order.member) not in self.recorded, "counted twice"
            self.recorded[order.round, order.member] = digest
            self.hands[order.member].pop(order.id, None)

    def reduced(self, job: str) -> None:
        effect = self.jobs.pop(job)
        share = 1 / len(effect.updates)
        self.put(
            events.Reduced(
                at=self.now(),
                job=job,
                digest=f"p{effect.round}",
                master=f"m{effect.round}",
                payload_bytes=8,
                weights=tuple((update.member, share) for update in effect.updates),
            )
        )

    def deadline(self, timer: str) -> None:
        self.timers.pop(timer)
        self.put(events.DeadlinePassed(at=self.now(), timer=timer))

    def put(self, event: events.Event) -> bool:
        """Record and decide, as the shell does; False when the core refuses."""
        before = self.run
        try:
            check(before, event)
        except FsllmError:
            return False
        self.log.append(events.dump(event))
        self.run, effects = decide(before, event)
        assert decide(before, events.load(self.log[-1])) == (self.run, effects), "not pure, or the JSON loses something"
        assert self.run.round >= before.round
        assert self.run.commits[: len(before.commits)] == before.commits, "a committed round changed"
        self.perform(effects)
        return True

    def perform(self, effects: list[Effect]) -> None:
        for effect in effects:
            match effect:
                case SendOrder(order):
                    self.check_order(order)
                    self.hands[order.member][order.id] = order
                case WithdrawOrder():
                    self.hands[effect.member].pop(effect.order_id, None)
                case SetTimer():
                    self.timers[effect.timer] = effect.seconds
                case ClearTimer():
                    self.timers.pop(effect.timer, None)
                case Reduce():
                    assert effect.round == 0 or len(effect.updates) >= self.run.plan.cohort.quorum
                    assert [u.member for u in effect.updates] == sorted(u.member for u in effect.updates)
                    self.jobs[effect.job] = effect
                case _:
                    pass

    def check_order(self, order: Order) -> None:
        member = self.run.members[order.member]
        # Orders that the same event has closed again need not fit the state that it has left.
        if order.id in self.run.orders:
            assert member.attached
            wanted = {
                Kind.JOIN: Standing.OFFERED,
                Kind.BUILD: Standing.JOINED,
                Kind.CHECK: Standing.JOINED,
                Kind.TRAIN: Standing.READY,
                Kind.EVALUATE: Standing.READY,
            }
            assert member.standing is wanted[order.kind], f"{order.kind} to a member that is {member.standing}"
            assert member.is_site or order.kind not in (Kind.TRAIN, Kind.BUILD)

    # What must hold.

    def the_log_is_the_truth(self) -> None:
        run: Run | None = None
        for body in self.log:
            run, _ = decide(run, events.load(body))
        assert run == self.run

    @invariant()
    def timers_are_those_of_the_state(self) -> None:
        assert set(self.timers) == {timer.id for timer in self.run.timers.values()}

    @invariant()
    def every_open_order_has_reached_its_member(self) -> None:
        for order in self.run.orders.values():
            if self.run.members[order.member].attached:
                assert order.id in self.hands[order.member]

    @invariant()
    def nothing_is_under_way_unless_it_runs(self) -> None:
        if not self.run.active:
            assert not self.run.orders
            assert not self.run.timers
        assert bool(self.run.phase) is not self.run.status.ended

    @invariant()
    def a_reduction_is_under_way_in_reduce(self) -> None:
        if self.run.active and self.run.phase == "reduce":
            assert self.run.job in self.jobs

    @invariant()
    def the_cohort_is_no_larger_than_asked_for(self) -> None:
        cohort = self.run.plan.cohort
        if cohort.size is not None:
            assert len(self.run.cohort) <= cohort.size * cohort.over_selection
            assert self.run.round == 0 or len(self.run.updates) <= cohort.size

    @invariant()
    def what_was_acknowledged_counts_once(self) -> None:
        if self.run.status is Status.CANCELLED:
            return
        counted = {(self.run.round, update.member): update.digest for update in self.run.updates.values()}
        for commit in self.run.commits:
            members = [one.update.member for one in commit.contributions]
            assert len(set(members)) == len(members)
            assert commit.round == 0 or len(members) >= self.run.plan.cohort.quorum
            assert math.isclose(sum(one.weight for one in commit.contributions), 1)
            for one in commit.contributions:
                assert (commit.round, one.update.member) not in counted
                counted[commit.round, one.update.member] = one.update.digest
        assert counted == self.recorded

    @invariant()
    def versions_are_numbered_by_round(self) -> None:
        assert [commit.version.number for commit in self.run.commits] == list(range(len(self.run.commits)))
        assert self.run.round in (len(self.run.commits), len(self.run.commits) - 1)

    @invariant()
    def it_can_say_what_it_waits_for(self) -> None:
        if self.run.active:
            assert PHASES[self.run.phase].describe(self.run)

    def teardown(self) -> None:
        """From every state, willing members bring the run to its end."""
        if not hasattr(self, "run"):
            return
        self.the_log_is_the_truth()
        if self.run.status.ended:
            return
        for name in ("x", "y", "z"):
            self.hands[name] = {}
        newcomers = [] if self.run.plan.cohort.sites is not None else ["x", "y", "z"]
        for name in [*MEMBERS, *newcomers]:
            self.hands[name] = {}
            role: Role = "evaluator" if name == "judge" else "site"
            self.put(events.MemberAttached(at=self.now(), member=name, role=role, held=()))
        willing = [m for m in self.run.members.values() if m.is_site and m.standing is not Standing.DECLINED]
        if len(willing) < self.run.plan.cohort.quorum:
            return
        for _ in range(200):
            if self.run.status is Status.PAUSED:
                self.put(events.Resumed(at=self.now()))
            self.one_good_step(timers=True)
            if self.run.status.ended:
                break
        assert self.run.status is Status.DONE, f"stuck: {self.run.phase} {self.run.message}"
        assert [commit.round for commit in self.run.commits] == [0, 1, 2, 3]
        self.the_log_is_the_truth()
        self.what_was_acknowledged_counts_once()


World.TestCase.settings = settings(
    max_examples=80,
    stateful_step_count=30,
    deadline=None,
    # Explaining a failure traces every line: minutes, for little.
    phases=[Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink],
    suppress_health_check=[HealthCheck.too_slow],
)
test_world = pytest.mark.slow(World.TestCase)


def played(plan: Plan, *happened: events.Event, trains: bool = False) -> tuple[Run, list[Effect]]:
    """Return the state and the last event's effects after these events."""
    run, effects = decide(
        None, events.Submitted(at=0, run_id="r", plan=canonical_json(plan).decode(), needs_trainer=trains)
    )
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
    return events.Reduced(at=5, job=run.job, digest="d", master="m", payload_bytes=8, weights=weights)


def ready(plan: Plan, *members: str, trains: bool = False) -> Run:
    """Return a run whose version 0 is published and checked by all."""
    run, _ = played(plan, *attach(*members), trains=trains)
    run = go(run, *answer_all(run, Kind.JOIN))
    if "gather" in run.timers:
        run = go(run, timer(run, "gather"))
    run = go(run, update(run.open_orders(Kind.BUILD)[0]))
    run = go(run, reduced(run))
    return go(run, *answer_all(run, Kind.CHECK))


def test_the_next_site_builds_when_the_first_can_not() -> None:
    run, _ = played(make_plan(), *attach("b", "a", "c"))
    run = go(run, *answer_all(run, Kind.JOIN))
    run = go(run, timer(run, "gather"))
    assert [o.member for o in run.open_orders(Kind.BUILD)] == ["a"]
    run = go(run, *answer_all(run, Kind.BUILD, "failed", reason="WORKER_DIED", message="m"))
    assert [o.member for o in run.open_orders(Kind.BUILD)] == ["b"]
    run = go(run, *answer_all(run, Kind.BUILD, "declined"))
    assert [o.member for o in run.open_orders(Kind.BUILD)] == ["c"]


def test_the_gathering_ends_early_when_all_the_plan_names_are_there() -> None:
    run, _ = played(make_plan(cohort={"sites": ["a", "b"]}), *attach("a", "b", "stranger"))
    assert "stranger" not in run.members
    assert run.open_orders(Kind.BUILD) == []
    run = go(run, *answer_all(run, Kind.JOIN))
    assert [o.member for o in run.open_orders(Kind.BUILD)] == ["a"]


def test_a_site_whose_version_0_differs_is_out() -> None:
    run, _ = played(make_plan(), *attach("a", "b", "c"))
    run = go(run, *answer_all(run, Kind.JOIN))
    run = go(run, timer(run, "gather"))
    run = go(run, update(run.open_orders(Kind.BUILD)[0]))
    run = go(run, reduced(run))
    b, c = answer_all(run, Kind.CHECK)
    bad = events.Answered(
        at=2,
        member="c",
        order_id=c.order_id,
        outcome="failed",
        reason="VERSION_ZERO_MISMATCH",
        message="differs",
    )
    run = go(run, b, bad)
    assert run.members["c"].standing is Standing.DECLINED
    assert run.members["c"].message == "differs"
    assert [o.member for o in run.open_orders(Kind.TRAIN)] == ["a", "b"]


def test_a_site_that_declined_is_asked_again_when_it_comes_back_or_the_run_is_resumed() -> None:
    run, _ = played(make_plan(), *attach("a"))
    run = go(run, *answer_all(run, Kind.JOIN, "declined", reason="DATA_INVALID", message="line 2"))
    assert run.members["a"].standing is Standing.DECLINED
    assert run.open_orders(Kind.JOIN) == []
    run = go(run, *attach("a"))
    assert [o.member for o in run.open_orders(Kind.JOIN)] == ["a"]
    assert run.members["a"].message == ""
    run = go(run, *answer_all(run, Kind.JOIN, "declined", reason="DATA_INVALID", message="line 2"))
    run = go(run, events.Paused(at=3), events.Resumed(at=4))
    assert [o.member for o in run.open_orders(Kind.JOIN)] == ["a"]


def test_a_late_site_checks_before_it_trains() -> None:
    run = ready(make_plan(), "a", "b")
    run = go(run, *attach("c"))
    run = go(run, *answer_all(run, Kind.JOIN))
    (check_order,) = run.open_orders(Kind.CHECK)
    assert (check_order.member, check_order.base) == ("c", run.zero)
    run = go(run, *answer_all(run, Kind.CHECK))
    assert [o.member for o in run.open_orders(Kind.TRAIN)] == ["a", "b"]
    run = go(run, *(update(o) for o in run.open_orders(Kind.TRAIN)))
    run = go(run, reduced(run))
    assert [o.member for o in run.open_orders(Kind.TRAIN)] == ["a", "b", "c"]
    assert {o.base for o in run.open_orders(Kind.TRAIN)} == {run.latest}


def test_a_failed_attempt_keeps_updates_and_asks_only_the_others() -> None:
    run = ready(make_plan(timing={"failed_rounds": 2}), "a", "b")
    a, b = run.open_orders(Kind.TRAIN)
    failed = events.Answered(at=6, member="b", order_id=b.id, outcome="failed", reason="WORKER_DIED", message="m")
    run, effects = decide(go(run, update(a)), failed)
    notices = [effect.message for effect in effects if isinstance(effect, Notify) and effect.kind == "failure"]
    assert notices == ["round 1 failed: only 1 of the 2 updates needed can still come (b: train failed: m) (kept: a)"]
    (again,) = run.open_orders(Kind.TRAIN)
    assert (again.member, again.round) == ("b", 1)
    assert again.id != b.id
    failed = events.Answered(at=7, member="b", order_id=again.id, outcome="failed", reason="WORKER_DIED", message="m")
    run = go(run, failed)
    assert (run.status, run.reason) == (Status.PAUSED, "QUORUM_NOT_REACHED")
    run = go(run, events.Resumed(at=8))
    run = go(run, *(update(o) for o in run.open_orders(Kind.TRAIN)))
    assert run.phase == "reduce"
    assert sorted(run.updates) == ["a", "b"]


def test_with_updates_kept_only_as_many_are_asked_as_are_missing() -> None:
    run = ready(make_plan(cohort={"size": 2, "over_selection": 1.5}, timing={"failed_rounds": 9}), *"abcdef")
    orders = run.open_orders(Kind.TRAIN)
    run = go(run, update(orders[0]))
    for order in orders[1:]:
        run = go(
            run,
            events.Answered(
                at=6, member=order.member, order_id=order.id, outcome="failed", reason="WORKER_DIED", message="m"
            ),
        )
    assert (run.phase, run.failures, len(run.updates)) == ("collect", 1, 1)
    assert len(run.cohort) == 3
    assert len(run.open_orders(Kind.TRAIN)) == 2


def test_the_deadline_closes_the_round_with_a_quorum_and_fails_it_without() -> None:
    plan = make_plan(timing={"collect_seconds": 5, "failed_rounds": 9})
    run = ready(plan, "a", "b", "c")
    orders = run.open_orders(Kind.TRAIN)
    closed = go(run, update(orders[2]), update(orders[0]), timer(run, "collect"))
    assert (closed.phase, sorted(closed.updates)) == ("reduce", ["a", "c"])
    failed = go(run, update(orders[0]), timer(run, "collect"))
    assert (failed.phase, failed.failures, sorted(failed.updates)) == ("collect", 1, ["a"])
    assert [o.member for o in failed.open_orders(Kind.TRAIN)] == ["b", "c"]


def test_the_first_updates_make_an_over_selected_round() -> None:
    run = ready(make_plan(cohort={"size": 2, "over_selection": 1.5}), "a", "b", "c", "d")
    assert len(run.cohort) == 3
    first, second, third = run.open_orders(Kind.TRAIN)
    after, effects = decide(go(run, update(third)), update(first))
    assert after.phase == "reduce"
    withdrawn = [(e.member, e.reason) for e in effects if isinstance(e, WithdrawOrder)]
    assert withdrawn == [(second.member, "ROUND_CLOSED")]


def test_a_detached_site_stays_in_the_round_until_it_is_idle() -> None:
    run = ready(make_plan(cohort={"quorum": 2}), "a", "b", "c")
    a, b, c = run.open_orders(Kind.TRAIN)
    run = go(run, events.MemberDetached(at=6, member="c"), update(a), update(b))
    assert run.phase == "collect"
    run = go(run, events.MemberIdle(at=7, member="c", order_id=c.id))
    assert run.phase == "reduce"
    assert sorted(run.updates) == ["a", "b"]


def test_recruiting_waits_for_a_quorum_and_its_deadline_fails_it() -> None:
    plan = make_plan(timing={"recruit_seconds": 5, "failed_rounds": 1}, rounds=2)
    run = ready(plan, "a", "b")
    orders = run.open_orders(Kind.TRAIN)
    run = go(run, *(update(o) for o in orders), events.MemberDetached(at=5, member="b"))
    run = go(run, reduced(run))
    assert (run.phase, run.round) == ("recruit", 2)
    assert PHASES["recruit"].describe(run) == "waiting for 1 more of 2 sites"
    paused = go(run, timer(run, "recruit"))
    assert paused.message == "round 2 failed once, at last: waiting for 1 more of 2 sites after 5 s"
    assert go(run, *attach("b")).phase == "collect"


def test_after_a_restart_recruiting_waits_a_moment_for_the_others() -> None:
    run = ready(make_plan(rounds=2), "a", "b", "c")
    run = go(
        run, *(update(o) for o in run.open_orders(Kind.TRAIN)), *(events.MemberDetached(at=5, member=m) for m in "abc")
    )
    run = go(run, reduced(run), events.ServerRestarted(at=9))
    two = go(run, *attach("a", "b"))
    assert two.phase == "recruit"
    assert go(two, *attach("c")).cohort == ("a", "b", "c")
    assert go(two, timer(two, "gather")).cohort == ("a", "b")


def test_evaluation_is_as_often_as_the_plan_says() -> None:
    def evaluated(every: int, trains: bool, base: bool = True) -> list[int]:
        run = ready(make_plan(rounds=5, evaluate={"every": every, "base": base}), "a", "b", trains=trains)
        rounds = []
        while run.active:
            if run.phase == "evaluate":
                rounds.append(run.round)
                run = go(run, *answer_all(run, Kind.EVALUATE))
            elif run.phase == "collect":
                run = go(run, *(update(o) for o in run.open_orders(Kind.TRAIN)))
            elif run.phase == "reduce":
                run = go(run, reduced(run))
        assert run.status is Status.DONE
        return rounds

    assert evaluated(2, trains=True, base=False) == [2, 4, 5]
    assert evaluated(1, True) == [0, 1, 2, 3, 4, 5]
    assert evaluated(2, True) == [0, 2, 4, 5]
    assert evaluated(0, True) == []
    assert evaluated(1, False) == []


def test_the_base_model_waits_for_an_evaluator_that_is_loading_but_not_for_ever() -> None:
    run = ready(make_plan(), "a", "b", trains=True)
    assert run.phase == "evaluate"
    run, _ = played(make_plan(), *attach("a", "b"), *attach("judge", role="evaluator"), trains=True)
    joins = answer_all(run, Kind.JOIN)
    run = go(run, joins[0], joins[1])
    run = go(run, timer(run, "gather"))
    run = go(run, update(run.open_orders(Kind.BUILD)[0]))
    run = go(run, reduced(run))
    run = go(run, *answer_all(run, Kind.CHECK))
    assert run.phase == "init"
    assert go(run, events.MemberIdle(at=9, member="judge", order_id=joins[2].order_id)).phase == "evaluate"
    run = go(run, joins[2])
    run = go(run, *answer_all(run, Kind.CHECK))
    assert [o.member for o in run.open_orders(Kind.EVALUATE)] == ["a", "b", "judge"]


def test_missing_metrics_do_not_stop_a_run() -> None:
    run = ready(make_plan(), "a", "b", trains=True)
    a, _ = answer_all(run, Kind.EVALUATE, metrics=(events.Metric(name="loss", value=1.5, weight=2),))
    run = go(run, a, timer(run, "evaluate"))
    (commit,) = run.commits
    assert [(e.member, e.metrics[0].value) for e in commit.evaluations] == [("a", 1.5)]
    assert run.phase == "collect"


def test_a_site_that_failed_to_join_is_asked_again_after_a_while() -> None:
    run, _ = played(make_plan(), *attach("a"))
    (join,) = run.open_orders(Kind.JOIN)
    run = go(run, *answer_all(run, Kind.JOIN, "failed", reason="INTERNAL", message="no disk"))
    assert run.members["a"].message == "join failed: no disk"
    run = go(run, timer(run, "retry:a"))
    (again,) = run.open_orders(Kind.JOIN)
    assert again.id != join.id


def test_the_draw_depends_on_seed_round_and_names_only() -> None:
    def drawn(seed: int, round_: int, names: list[str]) -> list[str]:
        plan = make_plan(seed=seed, cohort={"size": 3})
        return draw(Run("any", plan, False, 0.0, round=round_, members={n: Member(n, "site") for n in names}), names)

    names = [f"site-{i}" for i in range(10)]
    assert drawn(1, 1, names) == drawn(1, 1, names[::-1])
    picks = {tuple(sorted(drawn(seed, round_, names))) for seed in range(5) for round_ in range(20)}
    assert len(picks) > 40
    share = sum("site-0" in pick for seed in range(40) for round_ in range(25) for pick in [drawn(seed, round_, names)])
    # 1000 draws of 3 in 10: 300 expected, standard deviation 14.5.
    assert 230 < share < 370


def test_a_log_that_can_not_be_read_says_so() -> None:
    good = json.loads(events.dump(events.Paused(at=1.0)))
    assert events.load(json.dumps(good)) == events.Paused(at=1.0)
    for broken in ({**good, "version": 2}, {**good, "kind": "surprise"}, {**good, "extra": 1}):
        with pytest.raises(FsllmError) as error:
            events.load(json.dumps(broken))
        assert error.value.reason == "STATE_CORRUPT"
    with pytest.raises(FsllmError):
        decide(None, events.Paused(at=1.0))


def test_a_site_that_was_idle_is_waited_for_again_when_it_is_asked_again() -> None:
    run, _ = played(make_plan(cohort={"quorum": 1}, timing={"failed_rounds": 1}), *attach("a", "b"))
    joining = {order.member: order for order in run.open_orders(Kind.JOIN)}
    run = go(
        run,
        events.Answered(at=2, member="a", order_id=joining["a"].id, outcome="done"),
        events.MemberIdle(at=3, member="b", order_id=joining["b"].id),
    )
    run = go(run, timer(run, "gather"))
    run = go(run, *answer_all(run, Kind.BUILD, "failed"))
    assert run.status is Status.PAUSED
    run = go(run, events.Resumed(at=4))
    assert not run.members["b"].idle
    run = go(run, timer(run, "gather"))
    run = go(run, *answer_all(run, Kind.BUILD, "failed"))
    # It may be able to build what the other is not.
    assert (run.status, run.phase) == (Status.RUNNING, "init")
