"""Whole runs through the engine's shell, when something comes in between: operators, revocations, disks, watchers."""

import asyncio
from pathlib import Path

import pytest
from engine_harness import Member, make_plan, serving

from fsllm.v1 import control_pb2, federation_pb2
from fsllm_common.errors import FsllmError, Unavailable
from fsllm_server.store.events import Entry, EventLog


async def test_a_second_daemon_of_the_same_member_ends_the_first(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        first, second = Member(server, "a").attach(), Member(server, "a")
        await server.engine.submit(make_plan(), "r1")
        await first.order("join")
        second.attach()
        assert first.task is not None
        await first.task
        assert first.error is not None
        assert first.error.reason == "ATTACHED_ELSEWHERE"
        # The first stream's end is not the member's.
        first.session.close()
        Member(server, "b").attach()
        await second.order("build")


async def test_pause_resume_and_cancel(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        a, b = Member(server, "a").attach(), Member(server, "b").attach(silent="train")
        run = await server.engine.submit(make_plan(), "r1")
        await server.until(run, lambda n: (n.kind, n.subject, n.round) == ("update", "a", 1))
        await server.engine.pause(run)
        assert server.engine.get_run(run).message == "paused by an operator"
        assert server.engine.get_run(run).status == control_pb2.RUN_STATUS_PAUSED
        with pytest.raises(FsllmError) as unwanted:
            await b.upload(await b.order("train"), 1.0)
        assert unwanted.value.reason == "NOT_WANTED"
        assert [w.reason for w in b.withdrawn] == ["RUN_PAUSED"]

        await server.engine.resume(run)
        with pytest.raises(FsllmError) as running:
            await server.engine.resume(run)
        assert running.value.reason == "RUN_NOT_PAUSED"
        # a's update was kept: only b is asked again, under a new id.
        order = await b.order("train", 2)
        assert order.order_id != b.of("train")[0].order_id
        await b.upload(order, 1.0)
        await server.until(run, lambda n: n.kind == "commit" and n.round == 1)
        assert (await a.order("train", 2)).round == 2

        await server.engine.cancel(run)
        assert server.engine.get_run(run).status == control_pb2.RUN_STATUS_CANCELLED
        with pytest.raises(FsllmError) as ended:
            await server.engine.cancel(run)
        assert ended.value.reason == "RUN_ENDED"
        assert server.engine.version(run, 1).manifest.payload_bytes == 256


async def test_watching_goes_on_after_a_cut(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        for name in ("a", "b"):
            Member(server, name).attach()
        run = await server.engine.submit(make_plan(), "r1")
        await server.done(run)
        whole = [notice async for notice in server.engine.watch(run, 0)]
        assert [notice.sequence for notice in whole] == list(range(1, len(whole) + 1))
        assert [n.commit.version.number for n in whole if n.kind == "commit"] == [0, 1, 2, 3]
        rest = [notice async for notice in server.engine.watch(run, 10)]
        assert rest == whole[10:]
        await server.restart()
        assert [notice async for notice in server.engine.watch(run, 0)] == whole


async def test_live_watching_tells_all_once_and_in_order(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        members = [Member(server, name) for name in ("a", "b")]
        run = await server.engine.submit(make_plan(), "r1")

        async def watch() -> list[control_pb2.WatchRunResponse]:
            return [notice async for notice in server.engine.watch(run, 0) if notice.sequence]

        live = asyncio.create_task(watch())
        for member in members:
            member.attach()
        seen = await asyncio.wait_for(live, 20)
        assert seen == [notice async for notice in server.engine.watch(run, 0)]


async def test_the_same_request_submits_one_run(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        first = await server.engine.submit(make_plan(), "r1")
        assert await server.engine.submit(make_plan(), "r1") == first
        with pytest.raises(FsllmError) as other:
            await server.engine.submit(make_plan(rounds=9), "r1")
        assert other.value.reason == "PLAN_INVALID"
        await server.restart()
        assert await server.engine.submit(make_plan(), "r1") == first
        second = await server.engine.submit(make_plan(name="second"), "r2")
        assert [run.run_id for run in server.engine.list_runs()] == [first, second]
        assert server.engine.get_run("second").run_id == second
        assert server.engine.get_run(first[:6]).run_id == first
        assert server.engine.get_run(first).message == "init: waiting for 2 more of 2 sites to join"
        with pytest.raises(FsllmError) as unknown:
            server.engine.get_run("third")
        assert unknown.value.reason == "RUN_UNKNOWN"
        with pytest.raises(FsllmError) as no_version:
            server.engine.version(first, None)
        assert no_version.value.reason == "VERSION_UNKNOWN"


async def test_a_revoked_member_is_out_at_once(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        members = {name: Member(server, name) for name in "abc"}
        members["c"].act["train"] = members["c"].nothing
        for member in members.values():
            member.attach()
        run = await server.engine.submit(make_plan(rounds=1), "r1")
        await members["c"].order("train")
        await server.engine.forget_member("c")
        task = members["c"].task
        assert task is not None
        await task
        error = members["c"].error
        assert error is not None
        assert error.reason == "MEMBER_REVOKED"
        shown = await server.done(run)
        assert [c.member for c in shown.commits[1].contributions] == ["a", "b"]
        with pytest.raises(FsllmError) as gone:
            server.engine.blob("c", shown.commits[0].version.digest)
        assert gone.value.reason == "BLOB_UNKNOWN"


async def test_a_full_disk_during_the_reduction_pauses_and_can_be_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving(tmp_path) as server:
        a, b = Member(server, "a").attach(), Member(server, "b").attach(silent="train")
        run = await server.engine.submit(make_plan(rounds=1), "r1")
        order = await b.order("train")

        def full(folder: Path, size: int) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr("fsllm_server.store.blobs.demand_space", full)
            await b.upload(order, 1.0)
            await server.until(run, lambda n: n.kind == "status" and n.subject == "paused")
        message = server.engine.get_run(run).message
        assert "DISK_FULL" in message
        assert str(tmp_path / "blobs") in message
        assert not [p for p in (tmp_path / "blobs").iterdir() if p.name.startswith(".")]
        await server.engine.resume(run)
        shown = await server.done(run)
        assert [c.member for c in shown.commits[1].contributions] == ["a", "b"]
        assert len(a.of("train")) == 1


async def test_a_rejected_upload_is_told_and_changes_nothing(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        Member(server, "a").attach()
        b = Member(server, "b").attach(silent="train")
        run = await server.engine.submit(make_plan(rounds=1, wire={"max_update_norm": 1.0}), "r1")
        order = await b.order("train")
        manifest, payload = b.payload(order, 1.0)
        expected = server.engine.expect_upload("b", b.begin(order, manifest))
        assert not isinstance(expected, federation_pb2.Receipt)
        assert expected.max_norm == 1.0
        spool = server.spools.open(run, 1, "b", manifest)
        spool.write(0, memoryview(payload))
        with pytest.raises(FsllmError) as rejected:
            await spool.verify(manifest, max_norm=expected.max_norm)
        await server.engine.reject_upload(expected, rejected.value)
        notice = await server.until(run, lambda n: n.kind == "rejected")
        assert notice.subject == "b"
        assert "8" in notice.message
        assert server.metrics.updates_rejected.labels("NORM_TOO_LARGE")._value.get() == 1
        assert server.engine.upload_status("b", run, 1, manifest.digest).committed_offset == 0


async def test_an_answer_to_an_order_of_another_is_unknown(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        a = Member(server, "a").attach(silent="join")
        b = Member(server, "b").attach()
        await server.engine.submit(make_plan(), "r1")
        order = await a.order("join")
        with pytest.raises(FsllmError) as forged:
            await b.answer(order, done=federation_pb2.Done())
        assert forged.value.reason == "ORDER_UNKNOWN"


async def test_orders_of_a_run_that_is_over_are_withdrawn_at_the_next_attach(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        a = Member(server, "a")
        a.held = ["000000000000.3.train.a.17"]
        a.attach()
        async with asyncio.timeout(20), a.arrived:
            await a.arrived.wait_for(lambda: a.withdrawn)
        assert (a.withdrawn[0].order_id, a.withdrawn[0].reason) == (a.held[0], "ORDER_UNKNOWN")


async def test_watching_ends_with_an_error_when_the_server_stops(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        run = await server.engine.submit(make_plan(), "r1")
        notices = server.engine.watch(run, 0)
        assert (await anext(notices)).kind == "status"
        waiting = asyncio.ensure_future(anext(notices))
        await asyncio.sleep(0)
        await server.engine.stop()
        with pytest.raises(FsllmError) as stopped:
            await waiting
        assert stopped.value.reason == "SERVER_STOPPING"
        for refused in (server.engine.submit(make_plan(), "r2"), server.engine.pause(run)):
            with pytest.raises(FsllmError) as error:
                await refused
            assert error.value.reason == "SERVER_STOPPING"
        with pytest.raises(FsllmError):
            server.engine.attach("a", "site", federation_pb2.Hello())


async def test_an_event_of_its_own_is_recorded_as_soon_as_the_disk_allows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving(tmp_path) as server:
        run = await server.engine.submit(make_plan(), "r1")
        monkeypatch.setattr("fsllm_server.engine.runner.RECORD_AGAIN", 0.01)
        append, refused = EventLog.append, asyncio.Event()

        async def full(log: EventLog, run_id: str, entry: Entry) -> None:
            refused.set()
            raise Unavailable("DISK_FULL", "full")

        with monkeypatch.context() as patch:
            patch.setattr(EventLog, "append", full)
            with pytest.raises(FsllmError) as error:
                await server.engine.pause(run)
            assert error.value.reason == "DISK_FULL"
            refused.clear()
            a = Member(server, "a").attach()
            await asyncio.wait_for(refused.wait(), 10)
            # Nothing is done about what is not recorded.
            assert not a.orders
            assert not server.engine.get_run(run).members
        assert EventLog.append is append
        await a.order("join")
        assert (await server.until(run, lambda n: n.subject == "a")).message == "a is attached"


async def test_what_the_metrics_count(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        Member(server, "a", value=1.0).attach()
        Member(server, "b", value=2.0).attach()
        run = await server.engine.submit(make_plan(rounds=2, algorithm={"name": "fedavg"}), "r1")
        await server.until(run, lambda n: n.kind == "commit" and n.round == 1)
        value = server.metrics.registry.get_sample_value
        assert value("fsllm_server_loss", {"run": run, "role": "site"}) == 1.5
        await server.done(run)
        assert value("fsllm_server_updates_accepted_total") == 5
        assert value("fsllm_server_runs", {"status": "done"}) == 1
        assert value("fsllm_server_phase_seconds_count", {"phase": "collect"}) == 2
        # A run that is over leaves no series behind.
        assert value("fsllm_server_loss", {"run": run, "role": "site"}) is None
