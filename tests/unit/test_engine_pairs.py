"""Rounds in pairs (FedASK): the even one completes the odd one, by the same sites, which count the same."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from core_steps import answer_all, attach, go, ready, reduced, timer, update
from engine_harness import Member, Server, make_plan

from fsllm.v1 import federation_pb2
from fsllm_common.algorithms import algorithm_class
from fsllm_common.algorithms.noop import Noop
from fsllm_server.engine import events
from fsllm_server.engine.phases import PHASES
from fsllm_server.engine.state import Kind, Run, Status
from fsllm_server.store.events import EventLog

SIX = ("a", "b", "c", "d", "e", "f")


def paired(*members: str, **changes: Any) -> Run:  # noqa: ANN401
    """Return a run in its first round."""
    return replace(ready(make_plan(rounds=4, **changes), *members), in_pairs=True)


def asked(run: Run) -> list[str]:
    return [order.member for order in run.open_orders(Kind.TRAIN)]


def delivered(run: Run, *members: str) -> Run:
    """Return the run after these have delivered; all who were asked if none is named."""
    return go(run, *(update(o) for o in run.open_orders(Kind.TRAIN) if o.member in (members or asked(run))))


def second(*members: str, **changes: Any) -> Run:  # noqa: ANN401
    """Return a run in its second round."""
    run = delivered(paired(*members, **changes))
    return go(run, reduced(run))


@pytest.mark.parametrize("seed", range(8))
def test_the_even_round_asks_those_who_made_the_odd_one(seed: int) -> None:
    run = paired(*SIX, seed=seed, cohort={"size": 3, "over_selection": 1.34})
    four = asked(run)
    assert len(four) == 4
    run = delivered(run, *four[1:])
    run = go(run, reduced(run))
    assert (run.round, asked(run)) == (2, four[1:])
    run = delivered(run)
    run = go(run, reduced(run))
    # The next pair is drawn anew.
    assert (run.round, len(asked(run))) == (3, 4)


def test_a_run_whose_rounds_stand_alone_draws_each() -> None:
    drawn = []
    for seed in range(8):
        run = delivered(replace(paired(*SIX, seed=seed, cohort={"size": 3}), in_pairs=False))
        drawn.append([sorted(run.updates), asked(go(run, reduced(run)))])
    assert any(odd != even for odd, even in drawn)


def test_a_site_that_is_away_is_waited_for_by_name() -> None:
    run = delivered(paired("a", "b", "c"))
    run = go(run, events.MemberDetached(at=5, member="b"), *attach("new"))
    run = go(run, reduced(run))
    run = go(run, *answer_all(run, Kind.JOIN), *answer_all(run, Kind.CHECK))
    assert (run.round, run.phase, asked(run)) == (2, "recruit", [])
    assert PHASES["recruit"].describe(run).startswith("waiting for b, whose part of round 1")
    run = go(run, *attach("b"))
    assert asked(run) == ["a", "b", "c"]


def test_a_site_that_is_not_there_in_time_pauses_the_run_which_names_it() -> None:
    run = delivered(paired("a", "b", "c", timing={"recruit_seconds": 9, "failed_rounds": 2}))
    run = go(run, events.MemberDetached(at=5, member="b"))
    run = go(run, reduced(run))
    for _ in range(2):
        assert run.status is Status.RUNNING
        run = go(run, timer(run, "recruit"))
    assert run.status is Status.PAUSED
    assert "waiting for b" in run.message
    run = go(run, events.Resumed(at=6), *attach("b"))
    assert asked(run) == ["a", "b", "c"]


@pytest.mark.parametrize("why", ["deadline", "failed"])
def test_a_quorum_is_not_enough_for_the_even_round_and_what_came_is_kept(why: str) -> None:
    run = delivered(second("a", "b", "c", timing={"collect_seconds": 9, "failed_rounds": 2}), "a", "b")
    run = go(run, timer(run, "collect") if why == "deadline" else answer_all(run, Kind.TRAIN, "failed")[0])
    assert (run.phase, run.failures, sorted(run.updates), asked(run)) == ("collect", 1, ["a", "b"], ["c"])
    assert delivered(run).phase == "reduce"


def test_a_site_that_is_revoked_is_done_without() -> None:
    run = delivered(second("a", "b", "c"), "a", "b")
    run = go(run, events.MemberForgotten(at=6, member="c"))
    assert (run.phase, sorted(run.updates)) == ("reduce", ["a", "b"])
    run = delivered(paired("a", "b"))
    run = go(run, events.MemberForgotten(at=6, member="a"), events.MemberForgotten(at=6, member="b"), reduced(run))
    assert run.status is Status.PAUSED
    assert "nobody is left whose part of round 1" in run.message


class Counted(Member):
    """Counts tokens in odd rounds only, as a site that trains in these only."""

    async def do_train(self, order: federation_pb2.Order) -> None:
        await self.upload(order, self.value, tokens=10 * self.examples if order.round % 2 else 0)


async def test_updates_count_as_they_did_in_the_odd_round(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Noop, "in_pairs", True)
    plan = make_plan(rounds=2, algorithm={"weighting": "tokens"})
    async with Server(tmp_path) as server:
        members = [Counted(server, "a", examples=1).attach(), Counted(server, "b", examples=9).attach()]
        run = await server.engine.submit(plan, "1")
        done = await server.done(run)
        assert members
        weights = [{c.member: c.weight for c in commit.contributions} for commit in done.commits[1:]]
        assert weights == [{"a": 0.1, "b": 0.9}] * 2
        findings = [f.finding async for f in server.engine.verify(run, None) if f.finding.manifest.round]
        assert [(f.manifest.round, tuple(f.problems)) for f in findings] == [(1, ()), (2, ())]


async def test_shares_are_of_those_who_are_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Noop, "in_pairs", True)
    async with Server(tmp_path) as server:
        for name, examples in (("a", 1), ("b", 3), ("c", 4)):
            member = Member(server, name, examples=examples).attach()
        run = await server.engine.submit(make_plan(rounds=2), "1")
        await member.order("train")
        member.act["train"] = member.nothing
        await member.order("train", 2)
        await server.engine.forget_member("c")
        done = await server.done(run)
        assert [c.weight for c in done.commits[1].contributions] == [1 / 8, 3 / 8, 4 / 8]
        assert {c.member: c.weight for c in done.commits[2].contributions} == {"a": 1 / 4, "b": 3 / 4}


async def test_a_submitted_run_of_fedask_goes_in_pairs(tmp_path: Path) -> None:
    assert algorithm_class("fedask").in_pairs
    plan = make_plan(rounds=2, model={"name": "m"}, algorithm={"name": "fedask"})
    async with Server(tmp_path) as server:
        run = await server.engine.submit(plan, "1")
        (first, *_) = await EventLog(server.database).replay(run)
        assert json.loads(first.body)["in_pairs"] is True
