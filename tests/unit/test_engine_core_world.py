"""The pure core, played with random events: what must hold in every state, and that no state is a dead end."""

import math
from typing import Literal

import pytest
from core_steps import part
from engine_harness import make_plan
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from fsllm_common.errors import FsllmError
from fsllm_common.plan import canonical_json
from fsllm_server.engine import events
from fsllm_server.engine.core import check, decide
from fsllm_server.engine.effects import ClearTimer, Effect, Reduce, SendOrder, SetTimer, WithdrawOrder
from fsllm_server.engine.phases import PHASES
from fsllm_server.engine.rules import FIRST, LATEST
from fsllm_server.engine.state import Kind, Order, Run, Standing, Status

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
        rules=st.integers(FIRST, LATEST),
    )
    def submit(
        self,
        quorum: int,
        size: int | None,
        over: float,
        sites: tuple[str, ...] | None,
        trains: bool,
        deadlines: bool,
        rules: int,
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
        submitted = events.Submitted(at=0.0, run_id="r", plan=text, needs_trainer=trains, rules=rules)
        self.run, effects = decide(None, submitted)
        self.log.append(events.dump(submitted))
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
        assert self.run is before, "what changes nothing is not recorded"

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
                parts=(part(f"p{effect.round}", f"m{effect.round}"),),
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
