"""The pure core in chosen situations: what it decides, and why a run goes on or does not."""

import json
from dataclasses import replace

import pytest
from core_steps import answer_all, attach, go, played, ready, reduced, timer, update
from engine_harness import make_plan

from fsllm_common.errors import FsllmError
from fsllm_common.plan import canonical_json
from fsllm_server.engine import events
from fsllm_server.engine.core import decide, is_over
from fsllm_server.engine.effects import Notify, WithdrawOrder
from fsllm_server.engine.phases import PHASES
from fsllm_server.engine.phases.recruit import draw
from fsllm_server.engine.rules import FIRST, LATEST
from fsllm_server.engine.state import Kind, Member, Run, Standing, Status


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


def test_a_result_is_of_use_until_its_round_has_all_that_it_needs() -> None:
    """An attempt that failed wants it again; a set of updates that is fixed does not."""
    run = ready(make_plan(rounds=2, cohort={"size": 3, "quorum": 2}, timing={"failed_rounds": 1}), "a", "b", "c")
    assert is_over(run, "a", 0)
    a, b, c = run.open_orders(Kind.TRAIN)
    assert not any(is_over(run, name, 1) for name in "abc")
    failed = events.Answered(at=6, member="b", order_id=b.id, outcome="failed", reason="WORKER_DIED", message="m")
    lost = go(run, failed, failed.model_copy(update={"member": "a", "order_id": a.id}))
    assert lost.status is Status.PAUSED
    assert not any(is_over(lost, name, 1) for name in "abc")
    run = go(run, failed, update(a))
    assert not is_over(run, "a", 1)
    assert not is_over(run, "b", 1), "it may be asked again"
    run = go(run, update(c))
    assert run.phase == "reduce"
    assert all(is_over(run, name, 1) for name in "abc")
    assert not is_over(run, "b", 2), "its result of a later round: a server that was restored knows less"
    run = go(run, reduced(run))
    assert run.round == 2
    assert is_over(run, "b", 1)
    assert not is_over(run, "b", 2)
    cancelled = go(run, events.Cancelled(at=9))
    assert is_over(cancelled, "b", 2)


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
    run = go(run, a, events.Paused(at=3), events.Resumed(at=4))
    assert [o.member for o in run.open_orders(Kind.EVALUATE)] == ["b"]
    run = go(run, timer(run, "evaluate"))
    (commit,) = run.commits
    assert [(e.member, e.metrics[0].value) for e in commit.evaluations] == [("a", 1.5)]
    assert run.phase == "collect"


def all_gone_before_the_measurement(run: Run) -> Run:
    """Return a run whose server has restarted while it reduced, and has the version before anybody is back."""
    run = go(run, *(update(order) for order in run.open_orders(Kind.TRAIN)), events.ServerRestarted(at=5))
    return go(run, reduced(run))


def training() -> Run:
    """Return a run whose version 0 is measured."""
    run = ready(make_plan(), "a", "b", "c", trains=True)
    return go(run, *answer_all(run, Kind.EVALUATE))


def test_those_who_have_just_gone_measure_when_they_are_back() -> None:
    run = all_gone_before_the_measurement(training())
    assert run.phase == "evaluate"
    assert PHASES["evaluate"].describe(run) == "waiting for a, b, c"
    run = go(run, *attach("b", "a"))
    assert [order.member for order in run.open_orders(Kind.EVALUATE)] == ["a", "b"]
    # One that is revoked will not come, one that is not back by then is not waited for, and nobody is asked twice.
    run = go(run, *answer_all(run, Kind.EVALUATE, metrics=(events.Metric(name="loss", value=1.5, weight=2),)))
    assert run.phase == "evaluate"
    assert go(run, events.MemberForgotten(at=6, member="c")).phase == "collect"
    run = go(run, timer(run, "gather"))
    assert [e.member for e in run.commits[-1].evaluations] == ["a", "b"]
    run = go(run, timer(run, "gather"))
    assert run.phase == "collect"
    # The next version is measured by those who are here, without a wait.
    run = go(run, *attach("c"), *(update(order) for order in run.open_orders(Kind.TRAIN)))
    run = go(run, reduced(run))
    assert [order.member for order in run.open_orders(Kind.EVALUATE)] == ["a", "b", "c"]
    assert go(run, *answer_all(run, Kind.EVALUATE)).phase == "collect"


def test_the_first_ones_back_are_not_the_whole_cohort() -> None:
    """A proxy that restarts, say, parts all of them, wherever the round stands."""
    run = all_gone_before_the_measurement(training())
    run = go(run, timer(run, "gather"))
    assert run.phase == "recruit"
    run = go(run, *attach("a", "c"))
    assert run.phase == "recruit"
    assert go(run, timer(run, "gather")).cohort == ("a", "c")
    run = go(run, *attach("b"))
    assert run.cohort == ("a", "b", "c")


def test_one_who_comes_back_after_the_moment_finds_the_version_committed() -> None:
    run = all_gone_before_the_measurement(training())
    run = go(run, timer(run, "gather"))
    assert (run.phase, run.commits[-1].evaluations) == ("recruit", ())


def test_one_who_has_long_gone_is_not_waited_for() -> None:
    """But whoever has gone in this round, one by one or all at once."""
    run = ready(make_plan(), "a", "b", "c", trains=True)
    run = go(run, *answer_all(run, Kind.EVALUATE)[:2], events.MemberDetached(at=4, member="c"))
    run = go(run, timer(run, "evaluate"))
    assert run.phase == "recruit"
    run = go(run, timer(run, "gather"))
    assert run.cohort == ("a", "b")
    alone = all_gone_before_the_measurement(go(run, events.MemberDetached(at=4, member="b")))
    assert alone.awaited == {"a", "b"}
    run = go(run, *(update(order) for order in run.open_orders(Kind.TRAIN)))
    run = go(run, reduced(run))
    run = go(run, *answer_all(run, Kind.EVALUATE))
    assert (run.round, run.cohort) == (2, ("a", "b"))


def test_a_run_keeps_the_decisions_that_it_was_begun_with() -> None:
    run = all_gone_before_the_measurement(replace(training(), rules=FIRST))
    assert (run.phase, run.commits[-1].round) == ("recruit", 1)
    plan = canonical_json(make_plan()).decode()
    later = events.Submitted(at=0, run_id="r", plan=plan, needs_trainer=True, rules=LATEST + 1)
    with pytest.raises(FsllmError) as error:
        decide(None, later)
    assert error.value.reason == "STATE_NEWER"


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
