"""Whole runs through the engine's shell: real database, real files, members that answer as daemons do."""

import asyncio
from pathlib import Path

import numpy as np
import pytest
from engine_harness import KINDS, Member, make_plan, serving

from fsllm.v1 import federation_pb2
from fsllm_common.errors import FsllmError
from fsllm_common.tensors.arrays import decode
from fsllm_server.store.events import Entry, EventLog, RunRecord


async def test_a_run_goes_from_its_submission_to_done(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        a = Member(server, "a", value=1, examples=1).attach()
        b = Member(server, "b", value=4, examples=2).attach()
        run = await server.engine.submit(make_plan(), "r1")
        shown = await server.done(run)

        assert [commit.round for commit in shown.commits] == [0, 1, 2, 3]
        assert [commit.version.number for commit in shown.commits] == [0, 1, 2, 3]
        assert [KINDS[o.kind] for o in a.orders] == ["join", "build", "train", "train", "train"]
        assert [KINDS[o.kind] for o in b.orders] == ["join", "check", "train", "train", "train"]
        assert [round(c.weight, 6) for c in shown.commits[1].contributions] == [0.333333, 0.666667]
        assert {m.name: (m.standing, m.epsilon) for m in shown.members} == {"a": ("ready", 0.5), "b": ("ready", 0.5)}
        last = server.engine.version(run, None)
        assert last.manifest.adapter_config == '{"r": 4}'
        # Each round adds 1/3 x 1 + 2/3 x 4 = 3.
        for array in decode(last.manifest, last.payload).values():
            np.testing.assert_allclose(array, 9.0, rtol=1e-6)
        assert server.metrics.rounds.labels("committed")._value.get() == 4
    kept = {tuple(path.relative_to(tmp_path / "spools").parts[1:]) for path in (tmp_path / "spools").glob("*/*/*")}
    assert kept == {(round_, member) for round_ in "123" for member in "ab"}


async def test_evaluators_and_sites_evaluate_every_version(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        for name in ("a", "b"):
            Member(server, name).attach()
        Member(server, "judge", role="evaluator", value=7).attach()
        # fedavg needs a trainer, so it is evaluated; the harness does not care what the numbers are.
        run = await server.engine.submit(make_plan(rounds=1, algorithm={"name": "fedavg"}), "r1")
        shown = await server.done(run)
        for commit in shown.commits:
            assert [(m.member, m.metrics[0].value) for m in commit.metrics] == [("a", 1), ("b", 1), ("judge", 7)]
        assert [c.member for c in shown.commits[1].contributions] == ["a", "b"]


async def test_the_published_version_is_narrow_and_the_master_is_not(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        for name in ("a", "b"):
            Member(server, name, value=0.001).attach()
        run = await server.engine.submit(make_plan(wire={"element_type": "bf16"}), "r1")
        await server.done(run)
        published = server.engine.version(run, 3)
        assert published.payload.stat().st_size == published.manifest.payload_bytes == 64 * 2
        masters = [blob for blob in (tmp_path / "blobs").iterdir() if (blob / "payload").stat().st_size == 64 * 4]
        assert len(masters) == 4


async def test_a_restart_goes_on_where_it_stood(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        a, b = Member(server, "a").attach(), Member(server, "b").attach(silent="train")
        run = await server.engine.submit(make_plan(rounds=2), "r1")
        await server.until(run, lambda n: (n.kind, n.subject, n.round) == ("update", "a", 1))
        order = await b.order("train")
        before = server.engine.get_run(run)
        await server.restart()
        assert b.error is not None
        assert b.error.reason == "SERVER_STOPPING"

        after = server.engine.get_run(run)
        assert (after.phase, after.round) == ("collect", 1)
        assert list(after.commits) == list(before.commits)
        assert not any(member.attached for member in after.members)
        # b comes back with its order in hand, and a with none: neither is sent anything again.
        b.act.clear()
        b.held = [order.order_id]
        a.attach()
        b.attach()
        await b.upload(order, 1.0)
        shown = await server.done(run)
        assert len(a.of("train")) == 2
        assert [o.round for o in b.of("train")] == [1, 2]
        assert [c.member for c in shown.commits[1].contributions] == ["a", "b"]


async def test_an_order_is_sent_again_under_the_same_id(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        a, b = Member(server, "a").attach(), Member(server, "b").attach(silent="train")
        await server.engine.submit(make_plan(), "r1")
        first = await b.order("train")
        await b.leave()
        b.attach()
        again = await b.order("train", 2)
        assert again == first
        assert len(a.of("train")) == 1


async def test_a_partial_upload_resumes_after_a_restart(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        Member(server, "a").attach()
        b = Member(server, "b").attach(silent="train")
        run = await server.engine.submit(make_plan(), "r1")
        order = await b.order("train")
        manifest, payload = b.payload(order, 1.0)
        spool = server.spools.open(run, 1, "b", manifest)
        spool.write(0, memoryview(payload)[:100])
        spool.close()
        await server.restart()
        status = server.engine.upload_status("b", run, 1, manifest.digest)
        assert (status.committed_offset, status.HasField("receipt")) == (100, False)
        assert server.spools.open(run, 1, "b", manifest).offset == 100


async def test_the_same_payload_counts_once_and_another_conflicts(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        a, b = (Member(server, name).attach(silent="train") for name in "ab")
        run = await server.engine.submit(make_plan(rounds=1), "r1")
        order = await a.order("train")
        assert not (await a.upload(order, 2.0)).duplicate
        assert (await a.upload(order, 2.0)).duplicate
        with pytest.raises(FsllmError) as conflict:
            await a.upload(order, 3.0)
        assert conflict.value.reason == "UPDATE_CONFLICT"
        await b.upload(await b.order("train"), 2.0)
        shown = await server.done(run)
        assert [c.member for c in shown.commits[1].contributions] == ["a", "b"]
        # Also when the round is long over.
        assert (await a.upload(order, 2.0)).duplicate
        manifest, _ = a.payload(order, 2.0)
        assert server.engine.upload_status("a", run, 1, manifest.digest).receipt.payload_bytes == 256


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"order_id": "x.1.train.a.9"}, "NOT_WANTED"),
        ({"round": 7}, "NOT_WANTED"),
        ({"run_id": "nope"}, "NOT_WANTED"),
        ({"base_digest": b"\1" * 32}, "BASE_STALE"),
        ({"examples": 1 << 50}, "MANIFEST_INVALID"),
    ],
)
async def test_unwanted_uploads_are_refused(tmp_path: Path, changes: dict[str, object], reason: str) -> None:
    async with serving(tmp_path) as server:
        a = Member(server, "a").attach(silent="train")
        Member(server, "b").attach()
        await server.engine.submit(make_plan(), "r1")
        order = await a.order("train")
        with pytest.raises(FsllmError) as refused:
            await a.upload(order, 1.0, **changes)
        assert refused.value.reason == reason


async def test_an_upload_with_other_tensors_or_of_another_member_is_refused(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        a, b = (Member(server, name).attach(silent="train") for name in "ab")
        await server.engine.submit(make_plan(), "r1")
        order = await a.order("train")
        manifest, _ = a.payload(order, 1.0)
        manifest.tensors[0].shape[:] = [32]
        with pytest.raises(FsllmError) as refused:
            server.engine.expect_upload("a", a.begin(order, manifest))
        assert refused.value.reason == "MANIFEST_INVALID"
        with pytest.raises(FsllmError) as forged:
            await b.upload(order, 1.0)
        assert forged.value.reason == "NOT_WANTED"


async def test_an_update_that_loses_the_race_is_not_counted(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        members = [Member(server, name) for name in "abc"]
        for member in members:
            member.attach(silent="train")
        plan = make_plan(rounds=1, cohort={"size": 2, "over_selection": 1.5})
        run = await server.engine.submit(plan, "r1")
        orders = [await member.order("train") for member in members]
        # All three are expected and verified before any is recorded.
        ready = []
        for member, order in zip(members, orders, strict=True):
            manifest, payload = member.payload(order, 1.0)
            expected = server.engine.expect_upload(member.name, member.begin(order, manifest))
            assert not isinstance(expected, federation_pb2.Receipt)
            spool = server.spools.open(run, 1, member.name, manifest)
            spool.write(0, memoryview(payload))
            ready.append((expected, await spool.verify(manifest, max_norm=None)))
        await server.engine.record_upload(*ready[2])
        await server.engine.record_upload(*ready[0])
        with pytest.raises(FsllmError) as late:
            await server.engine.record_upload(*ready[1])
        assert late.value.reason in ("NOT_WANTED", "ROUND_CLOSED")
        shown = await server.done(run)
        assert [c.member for c in shown.commits[1].contributions] == ["a", "c"]
        assert [w.reason for w in members[1].withdrawn] == ["ROUND_CLOSED"]


async def test_a_site_that_makes_no_progress_is_dropped(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        for name in ("a", "b"):
            Member(server, name).attach()
        c = Member(server, "c").attach(silent="train")
        run = await server.engine.submit(make_plan(rounds=1, timing={"idle_seconds": 0.3}), "r1")
        shown = await server.done(run)
        assert [x.member for x in shown.commits[1].contributions] == ["a", "b"]
        assert [w.reason for w in c.withdrawn] == ["SITE_IDLE"]


async def test_progress_keeps_a_slow_site_in_the_round(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        a, b = Member(server, "a").attach(), Member(server, "b")

        async def slowly(order: federation_pb2.Order) -> None:
            # Twice the idle time, a step at a time.
            for step in range(1, 9):
                await asyncio.sleep(0.1)
                progress = federation_pb2.Progress(order_id=order.order_id, activity="training", done=step, total=8)
                server.engine.progress("b", progress)
            await b.upload(order, 1.0)

        b.act["train"] = slowly
        b.attach()
        run = await server.engine.submit(make_plan(rounds=1, timing={"idle_seconds": 0.4}), "r1")
        shown = await server.done(run)
        assert [c.member for c in shown.commits[1].contributions] == ["a", "b"]
        assert not a.withdrawn
        assert not b.withdrawn


async def test_repeated_progress_is_none(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        Member(server, "a").attach()
        b = Member(server, "b")
        stop = asyncio.Event()

        async def stuck(order: federation_pb2.Order) -> None:
            while not stop.is_set():
                server.engine.progress(
                    "b", federation_pb2.Progress(order_id=order.order_id, activity="training", done=3)
                )
                await asyncio.sleep(0.02)

        b.act["train"] = stuck
        b.attach()
        run = await server.engine.submit(make_plan(timing={"idle_seconds": 0.3, "failed_rounds": 1}), "r1")
        notice = await server.until(run, lambda n: n.kind == "status" and n.subject == "paused")
        stop.set()
        assert "failed once" in notice.message


async def test_a_submission_whose_caller_leaves_is_the_same_run_when_it_comes_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit = EventLog.submit

    async def and_then_the_caller_leaves(log: EventLog, record: RunRecord, entry: Entry) -> None:
        await submit(log, record, entry)
        first.cancel()
        await asyncio.sleep(0)

    monkeypatch.setattr(EventLog, "submit", and_then_the_caller_leaves)
    async with serving(tmp_path) as server:
        a = Member(server, "a").attach()
        Member(server, "b").attach()
        first = asyncio.create_task(server.engine.submit(make_plan(), "r1"))
        with pytest.raises(asyncio.CancelledError):
            await first
        run = await server.engine.submit(make_plan(), "r1")
        assert [known.run_id for known in server.engine.list_runs()] == [run]
        await a.order("join")
        await server.done(run)
