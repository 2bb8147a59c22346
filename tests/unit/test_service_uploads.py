"""Two streams of one site at once: what one has delivered the other never touches, and each hears what came of it."""

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from engine_harness import Member, Server, make_plan, serving

from fsllm.v1.federation_pb2 import Order, UploadRequest, UploadResponse
from fsllm_common.errors import FsllmError
from fsllm_common.telemetry.metrics import ServerMetrics
from fsllm_common.tensors.chunks import read_chunks
from fsllm_server.service import guard
from fsllm_server.service.disk_quota import DiskQuota
from fsllm_server.service.guard import Call
from fsllm_server.service.pace import PaceLimits
from fsllm_server.service.uploads import Uploads
from fsllm_server.store.events import Entry, EventLog
from fsllm_server.store.spools import Spool


class Stream:
    """One Upload call that has announced what it will send."""

    def __init__(self, uploads: Uploads, member: Member, order: Order, value: float) -> None:
        manifest, _ = member.payload(order, value)
        self._chunks = list(read_chunks(member.server.folder / f"{member.name}.payload"))
        self._uploads, self._member = uploads, member.name
        self._requests: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._requests.put_nowait(UploadRequest(begin=member.begin(order, manifest)).SerializeToString())
        self.responses: asyncio.Queue[UploadResponse] = asyncio.Queue()
        self.task = asyncio.create_task(self._serve())

    def send(self) -> None:
        """Send all there is."""
        for chunk in (*self._chunks, None):
            self._requests.put_nowait(chunk)

    async def _read(self) -> AsyncIterator[bytes]:
        while (wire := await self._requests.get()) is not None:
            yield wire

    async def _serve(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        guard._this.set(Call(Any, task))  # type: ignore[arg-type]
        async for response in self._uploads.take(self._member, self._read()):
            self.responses.put_nowait(response)

    async def kind(self) -> str:
        """Return what the next response is."""
        async with asyncio.timeout(20):
            return (await self.responses.get()).WhichOneof("kind") or ""


async def as_far_as_it_goes() -> None:
    for _ in range(100):
        await asyncio.sleep(0)


async def first_of_two(server: Server, uploads: Uploads) -> tuple[str, Order, Member, Stream]:
    """Return a run in its only round, and a stream that has sent everything."""
    a, b = (Member(server, name).attach(silent="train") for name in "ab")
    run = await server.engine.submit(make_plan(rounds=1), "r1")
    await b.upload(await b.order("train"), 2.0)
    order = await a.order("train")
    stream = Stream(uploads, a, order, 1.0)
    assert await stream.kind() == "ready"
    stream.send()
    return run, order, a, stream


def uploads_of(server: Server) -> Uploads:
    quota = DiskQuota(server.folder / "spools", 1 << 40)
    return Uploads(server.engine, server.spools, 4, PaceLimits(60, 0), quota, ServerMetrics())


@pytest.mark.parametrize("value", [1.0, 5.0], ids=["the same", "another"])
async def test_a_stream_that_comes_while_one_is_recorded_waits_for_what_becomes_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    recording, go_on = asyncio.Event(), asyncio.Event()

    async def append(
        log: EventLog, run: str, entry: Entry, really: Callable[..., Awaitable[None]] = EventLog.append
    ) -> None:
        if entry.kind == "update" and '"member":"a","order_id"' in entry.body and ".train." in entry.body:
            recording.set()
            await go_on.wait()
        await really(log, run, entry)

    monkeypatch.setattr(EventLog, "append", append)
    async with serving(tmp_path) as server:
        uploads = uploads_of(server)
        run, order, a, first = await first_of_two(server, uploads)
        async with asyncio.timeout(20):
            await recording.wait()
        second = Stream(uploads, a, order, value)
        await as_far_as_it_goes()
        assert second.responses.empty()
        go_on.set()
        assert await first.kind() == "receipt"
        if value == 1.0:
            assert await second.kind() == "receipt"
        else:
            with pytest.raises(FsllmError) as refused:
                await second.task
            assert refused.value.reason == "UPDATE_CONFLICT"
        done = await server.done(run)
        assert len(done.commits[1].contributions) == 2


async def test_what_is_here_is_judged_though_its_sender_has_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread may still sync and read the file: the next stream must not open it under its hands."""
    syncing, go_on = threading.Event(), threading.Event()

    def sync(spool: Spool, manifest: object, really: Callable[..., None] = Spool._sync) -> None:
        if held:
            syncing.set()
            go_on.wait(20)
        really(spool, manifest)

    held: list[bool] = []
    monkeypatch.setattr(Spool, "_sync", sync)
    async with serving(tmp_path) as server:
        uploads = uploads_of(server)
        run, order, a, first = await first_of_two(server, uploads)
        held.append(True)
        assert await asyncio.to_thread(syncing.wait, 20)
        first.task.cancel()
        await asyncio.wait([first.task])
        second = Stream(uploads, a, order, 1.0)
        await as_far_as_it_goes()
        assert second.responses.empty()
        go_on.set()
        assert await second.kind() == "receipt"
        assert len((await server.done(run)).commits[1].contributions) == 2
