"""A database that commits and is gone before it has said so: the log is what counts, not what one heard of it."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from engine_harness import Member, make_plan, serving

from fsllm.v1.federation_pb2 import Order
from fsllm_common.errors import FsllmError, Unavailable
from fsllm_server.engine import runner
from fsllm_server.store.events import Entry, EventLog


class Deaf:
    """Loses the answer to the first commit of a kind of event, once so many are there."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, kind: str, after: int) -> None:
        self.lost = asyncio.Event()
        really = EventLog.append

        async def append(log: EventLog, run: str, entry: Entry) -> None:
            await really(log, run, entry)
            if entry.kind == kind and entry.sequence > after and not self.lost.is_set():
                self.lost.set()
                raise Unavailable("STATE_CORRUPT", "the server closed the connection unexpectedly", retry_after=1)

        monkeypatch.setattr(EventLog, "append", append)
        monkeypatch.setattr(runner, "RECORD_AGAIN", 0.01)


def again(act: Callable[[Order], Any]) -> Callable[[Order], Any]:
    """Return what a daemon does: it tries again."""

    async def trying(order: Order) -> None:
        try:
            await act(order)
        except Unavailable:
            await act(order)

    return trying


@pytest.mark.parametrize("kind", ["update", "reduced", "deadline"])
async def test_what_was_recorded_counts_once_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    deaf = Deaf(monkeypatch, kind, after=8)
    async with serving(tmp_path) as server:
        a, b = (Member(server, name) for name in "ab")
        for member in (a, b):
            member.act["train"] = again(member.do_train)
            member.attach()
        plan = make_plan(rounds=2, timing={"collect_seconds": 0.5}, cohort={"quorum": 1})
        if kind == "deadline":
            b.act["train"] = b.nothing  # the round ends with the deadline
        run = await server.engine.submit(plan, "r1")
        done = await server.done(run)
        assert deaf.lost.is_set()
        assert len(done.commits) == 3
        for commit in done.commits[1:]:
            members = [one.member for one in commit.contributions]
            assert len(set(members)) == len(members)
        entries = await EventLog(server.database).replay(run)
        assert [entry.sequence for entry in entries] == list(range(1, len(entries) + 1))
        assert [error for error in (a.error, b.error) if error is not None] == []
        # What the log says is what this process has made of it.
        state = server.engine._runners[run].run
        await server.restart()
        assert server.engine._runners[run].run == state


async def test_one_that_asked_hears_that_the_outcome_is_unknown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving(tmp_path) as server:
        member = Member(server, "a").attach(silent="train")
        run = await server.engine.submit(make_plan(cohort={"quorum": 1}), "r1")
        order = await member.order("train")
        deaf = Deaf(monkeypatch, "update", after=6)
        with pytest.raises(FsllmError, match="unexpectedly"):
            await member.upload(order, 1.0)
        assert deaf.lost.is_set()
        receipt = await member.upload(order, 1.0)
        assert receipt.payload_bytes > 0
        await server.until(run, lambda notice: notice.kind == "commit" and notice.round == 1)
