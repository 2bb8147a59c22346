"""What a caller sees of an error, over a real connection, and what only the log says."""

# Methods have the contract's names, and any message.
# ruff: noqa: ANN401, N802

import asyncio
import sys
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import grpc
import pytest

from fsllm.v1 import control_pb2, control_pb2_grpc
from fsllm_common.errors import FsllmError, Unavailable
from fsllm_common.identity.credentials import Identity
from fsllm_common.identity.names import Member, Role
from fsllm_common.rpc_errors import error_from
from fsllm_common.telemetry.metrics import ServerMetrics
from fsllm_server.service.boundary import Boundary, Handler, register
from fsllm_server.service.guard import Calls

PRIVATE = "a patient's name"


class Service(control_pb2_grpc.ControlServiceServicer):
    """Fails in every way."""

    async def GetRun(self, request: Any, context: Any) -> Any:
        raise FsllmError("RUN_UNKNOWN", "There is no such run", cure="Look again.", retry_after=2.5)

    async def ListRuns(self, request: Any, context: Any) -> Any:
        raise KeyError(PRIVATE)

    async def WatchRun(self, request: Any, context: Any) -> AsyncGenerator[Any]:
        yield control_pb2.WatchRunResponse(sequence=1)
        raise Unavailable("DISK_FULL", "No space")

    async def GetServer(self, request: Any, context: Any) -> Any:
        return control_pb2.GetServerResponse(federation="f")

    async def raw(self, request: bytes, context: Any) -> AsyncGenerator[bytes]:
        yield request + b"!"


for name in (method.name for method in control_pb2.DESCRIPTOR.services_by_name["ControlService"].methods):
    if name not in vars(Service):
        setattr(Service, name, Service.GetServer)
Service.__abstractmethods__ = frozenset()


@asynccontextmanager
async def serving(
    metrics: ServerMetrics, service: Any = None, boundary: Boundary | None = None
) -> AsyncIterator[grpc.aio.Channel]:
    server = grpc.aio.server(interceptors=[boundary or Boundary(metrics)])
    service = service or Service()  # type: ignore[abstract] # the rest is set below the class
    raw: dict[str, Handler] = {"ExportRun": grpc.unary_stream_rpc_method_handler(service.raw)}
    register(server, "fsllm.v1.ControlService", service, control_pb2_grpc.add_ControlServiceServicer_to_server, raw)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield channel
    finally:
        await server.stop(0)


async def test_errors_as_callers_see_them(capsys: pytest.CaptureFixture[str]) -> None:
    metrics = ServerMetrics()
    async with serving(metrics) as channel:
        stub: Any = control_pb2_grpc.ControlServiceStub(channel)
        with pytest.raises(grpc.RpcError) as known:
            await stub.GetRun(control_pb2.GetRunRequest())
        error = error_from(known.value)
        assert (error.reason, error.message, error.cure, error.retry_after) == (
            *("RUN_UNKNOWN", "There is no such run", "Look again."),
            2.5,
        )
        with pytest.raises(grpc.RpcError) as bug:
            await stub.ListRuns(control_pb2.ListRunsRequest())
        said = error_from(bug.value)
        assert said.reason == "INTERNAL"
        number = said.message.rsplit(" ", 1)[1]
        assert PRIVATE not in str(bug.value)
        logged = capsys.readouterr()
        assert number in logged.out + logged.err
        call = stub.WatchRun(control_pb2.WatchRunRequest())
        assert (await anext(aiter(call))).sequence == 1
        with pytest.raises(grpc.RpcError) as late:
            async for _ in call:
                pass
        assert error_from(late.value).reason == "DISK_FULL"
        assert (await stub.GetServer(control_pb2.GetServerRequest())).federation == "f"
        export: Any = channel.unary_stream("/fsllm.v1.ControlService/ExportRun")
        exported = export(b"as it is")
        assert [frame async for frame in exported] == [b"as it is!"]
    count = metrics.registry.get_sample_value
    for method, reason in (
        ("GetRun", "RUN_UNKNOWN"),
        ("ListRuns", "INTERNAL"),
        ("GetServer", "OK"),
        ("ExportRun", "OK"),
    ):
        assert count("fsllm_server_calls_total", {"method": method, "reason": reason}) == 1


class Counted(Boundary):
    """Keeps the calls in a book, as the guard does."""

    def __init__(self, calls: Calls) -> None:
        super().__init__(ServerMetrics())
        self._calls = calls

    def entered(self, method: str, context: Any) -> Any:
        return self._calls.entered(peer("a"), context)


class Ends(Service):  # type: ignore[misc] # abstract only to the checker
    """Has every call ended while its first response is being written."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    async def WatchRun(self, request: Any, context: Any) -> AsyncGenerator[Any]:
        ended = Unavailable("SERVER_STOPPING", "The server stops")
        asyncio.get_running_loop().call_soon(self._calls.end_all, ended)
        yield control_pb2.WatchRunResponse(sequence=1)
        await asyncio.Event().wait()


async def test_a_call_that_is_ended_at_its_first_response_says_why() -> None:
    calls = Calls(1)
    async with serving(ServerMetrics(), Ends(calls), Counted(calls)) as channel:
        for _ in range(20):
            stub = control_pb2_grpc.ControlServiceStub(channel)
            call: Any = stub.WatchRun(control_pb2.WatchRunRequest(), timeout=10)
            with pytest.raises(grpc.RpcError) as ended:
                async for _response in call:
                    pass
            assert error_from(ended.value).reason == "SERVER_STOPPING"


def peer(name: str, life: timedelta = timedelta(hours=1)) -> Identity:
    return Identity(Member("f", Role.SITE, name), "1", datetime.now(UTC) + life)


async def hold(calls: Calls, who: Identity, entered: asyncio.Event) -> None:
    with calls.entered(who):
        entered.set()
        await asyncio.Event().wait()


async def test_calls_are_counted_and_ended_by_name() -> None:
    calls = Calls(2)
    inside = [asyncio.Event(), asyncio.Event()]
    tasks = [asyncio.create_task(hold(calls, peer(name), event)) for name, event in zip("ab", inside, strict=True)]
    await asyncio.gather(*(event.wait() for event in inside))
    with pytest.raises(Unavailable, match="2 calls") as busy, calls.entered(peer("c")):
        pass
    assert busy.value.retry_after
    calls.end_member("a", FsllmError("MEMBER_REVOKED", "out"))
    with pytest.raises(FsllmError, match="out"):
        await tasks[0]
    assert not tasks[1].done()
    with calls.entered(peer("b")):  # the caller's own call stays
        calls.end_member("b", FsllmError("MEMBER_REVOKED", "out"))
        with pytest.raises(FsllmError, match="out"):
            await tasks[1]


async def test_a_call_that_its_caller_cancels_is_cancelled() -> None:
    calls, entered = Calls(1), asyncio.Event()
    task = asyncio.create_task(hold(calls, peer("a"), entered))
    await entered.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    with calls.entered(peer("a")):  # its place is free again
        pass


async def test_a_call_ends_with_its_certificate() -> None:
    with pytest.raises(FsllmError) as error:
        await hold(Calls(1), peer("a", timedelta(milliseconds=5)), asyncio.Event())
    assert error.value.reason == "CERTIFICATE_EXPIRED"


async def test_nothing_keeps_a_chunk_that_is_written() -> None:
    references: list[int] = []

    class Sending(Service):
        async def raw(self, request: bytes, context: Any) -> AsyncGenerator[bytes]:
            chunk = bytes(1000)
            alone = sys.getrefcount(chunk)
            yield chunk
            references.append(sys.getrefcount(chunk) - alone)

    async with serving(ServerMetrics(), Sending()) as channel:  # type: ignore[abstract] # as in ``serving``
        export: Any = channel.unary_stream("/fsllm.v1.ControlService/ExportRun")
        assert [len(frame) async for frame in export(b"")] == [1000]
    assert references == [0]
