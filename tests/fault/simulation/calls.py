"""Calls over the virtual network, with the faces that grpc.aio gives to clients and to servicers.

Messages cross as bytes, through the real serialisers, the server's real interceptor and real handlers.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, NoReturn

import grpc

from fsllm_common.rpc_errors import error_from
from simulation.loop import CURRENT, Process
from simulation.network import Connection, Network

OVERHEAD: Final = 40
"""Bytes of a message besides its own."""
Serializer = Callable[[Any], bytes]


class Mailbox:
    """Messages for one reader."""

    def __init__(self) -> None:
        self._items: deque[Any] = deque()
        self._waiter: asyncio.Future[None] | None = None

    def put(self, item: object) -> None:
        self._items.append(item)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def get(self) -> Any:  # noqa: ANN401 - a message, an error or grpc's EOF
        while not self._items:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        return self._items.popleft()


class Call:
    """The client's side."""

    def __init__(
        self,
        network: Network,
        method: str,
        serialize: Serializer | None,
        parse: Callable[[bytes], Any] | None,
        certificate: bytes,
    ) -> None:
        client = CURRENT.get()
        assert client is not None
        self.method = method.rpartition("/")[2]
        self.path = method
        self.client = client
        self.certificate = certificate
        self._network = network
        self._serialize = serialize or (lambda message: message)
        self._parse = parse or (lambda message: message)
        self._incoming = Mailbox()
        self._half_closed = False
        self._ended: grpc.aio.AioRpcError | bool | None = None
        """True: with success."""
        self.connection = network.connection(client)
        self.connection.calls[self] = None
        self.connection.send(0, OVERHEAD, self._open)

    def _open(self) -> None:
        serve = self._network.serve
        if serve is not None:
            self.connection.served[self] = serve(self.connection, self)

    # What grpc.aio's calls can do.

    async def write(self, message: Any) -> None:  # noqa: ANN401
        if self._ended is not None or self._half_closed:
            raise asyncio.InvalidStateError("RPC already finished.")
        wire = self._serialize(message)
        self._network.history.sent(self, message, wire)
        await asyncio.sleep(self.connection.send(0, OVERHEAD + len(wire), lambda: self._to_server(wire)))

    def ask(self, message: Any) -> "Call":  # noqa: ANN401
        """Send the one request of a call that streams its answers."""
        wire = self._serialize(message)
        self._network.history.sent(self, message, wire)
        self.connection.send(0, OVERHEAD + len(wire), lambda: self._to_server(wire))
        self.connection.send(0, OVERHEAD, lambda: self._to_server(None))
        self._half_closed = True
        return self

    async def done_writing(self) -> None:
        if self._ended is None:
            self._half_closed = True
            self.connection.send(0, OVERHEAD, lambda: self._to_server(None))

    async def read(self) -> Any:  # noqa: ANN401
        item = await self._incoming.get()
        if isinstance(item, grpc.aio.AioRpcError) or item is grpc.aio.EOF:
            self._incoming.put(item)
            if item is not grpc.aio.EOF:
                raise item
        return item

    def __aiter__(self) -> "Call":
        return self

    async def __anext__(self) -> Any:  # noqa: ANN401
        item = await self.read()
        if item is grpc.aio.EOF:
            raise StopAsyncIteration
        return item

    def cancel(self) -> bool:
        if self._ended is not None:
            return False
        self._ended = _error(grpc.StatusCode.CANCELLED, "Locally cancelled by application!", ())
        self._incoming.put(self._ended)
        self.connection.send(0, OVERHEAD, self._cancel_at_server)
        return True

    def done(self) -> bool:
        return self._ended is not None

    # What arrives.

    def arrived(self, wire: bytes) -> None:
        if self._ended is None:
            message = self._parse(wire)
            self._network.history.received(self, message)
            self._incoming.put(message)

    def finished(self, code: grpc.StatusCode, details: str, trailing: tuple[tuple[str, bytes], ...]) -> None:
        self.connection.calls.pop(self, None)
        if self._ended is None:
            self._end(code, details, trailing)

    def lost(self, why: str) -> None:
        """The connection is broken."""
        self.finished(grpc.StatusCode.UNAVAILABLE, why, ())

    def _end(self, code: grpc.StatusCode, details: str, trailing: tuple[tuple[str, bytes], ...]) -> None:
        if code is grpc.StatusCode.OK:
            self._ended = True
            self._incoming.put(grpc.aio.EOF)
            self._network.history.outcome(self, None)
        else:
            error = _error(code, details, trailing)
            self._ended = error
            self._incoming.put(error)
            self._network.history.outcome(self, error_from(error))

    def _to_server(self, wire: bytes | None) -> None:
        if (served := self.connection.served.get(self)) is not None:
            served.requests.arrived(wire)

    def _cancel_at_server(self) -> None:
        if (served := self.connection.served.pop(self, None)) is not None:
            served.lost()


def _error(code: grpc.StatusCode, details: str, trailing: tuple[tuple[str, bytes], ...]) -> grpc.aio.AioRpcError:
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(*trailing), details)


class Requests:
    """What the servicer reads from."""

    def __init__(self, parse: Callable[[bytes], Any] | None, consumed: Callable[[bytes], None]) -> None:
        self._parse = parse or (lambda wire: wire)
        self._mailbox = Mailbox()
        self._over = False
        self._consumed = consumed
        self._last: bytes | None = None

    def arrived(self, wire: bytes | None) -> None:
        self._mailbox.put(wire)

    def __aiter__(self) -> "Requests":
        return self

    async def __anext__(self) -> Any:  # noqa: ANN401
        if self._last is not None:
            # Who asks for the next message has dealt with the last one.
            self._consumed(self._last)
            self._last = None
        wire = None if self._over else await self._mailbox.get()
        if wire is None:
            self._over = True
            raise StopAsyncIteration
        self._last = wire
        return self._parse(wire)


class ServicerContext:
    """The part of grpc.aio's servicer context that servicers may use."""

    def __init__(self, served: "Served", serialize: Serializer | None) -> None:
        self._served = served
        self._serialize = serialize or (lambda message: message)

    async def send_initial_metadata(self, metadata: tuple[()]) -> None:
        """Here headers travel with the first message."""
        if self._served.is_lost:
            raise grpc.aio.InternalError("the peer has left")  # type: ignore[attr-defined]

    async def write(self, message: Any) -> None:  # noqa: ANN401
        if self._served.is_lost:
            raise grpc.aio.InternalError("the peer has left")  # type: ignore[attr-defined]
        wire = self._serialize(message)
        served = self._served
        served.network.history.answered(served.call, message)
        await asyncio.sleep(served.connection.send(1, OVERHEAD + len(wire), lambda: served.call.arrived(wire)))

    async def abort(
        self, code: grpc.StatusCode, details: str = "", trailing_metadata: tuple[tuple[str, bytes], ...] = ()
    ) -> NoReturn:
        self._served.end(code, details, trailing_metadata)
        raise grpc.aio.AbortError  # type: ignore[attr-defined]

    def auth_context(self) -> dict[str, list[bytes]]:
        return {"x509_pem_cert": [self._served.call.certificate]}

    def peer(self) -> str:
        return f"ipv4:10.0.0.1:{10_000 + self._served.call.client.number}"

    def add_done_callback(self, callback: Callable[["ServicerContext"], object]) -> None:
        self._served.task.add_done_callback(lambda _: callback(self))

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        return ()

    def set_trailing_metadata(self, trailing: object) -> None:
        """Abort carries ours."""


@dataclass(frozen=True)
class Details:
    """grpc.HandlerCallDetails."""

    method: str
    invocation_metadata: tuple[tuple[str, str], ...] = ()


class Served:
    """The server's side of a call."""

    def __init__(self, network: Network, connection: Connection, call: Call) -> None:
        self.network = network
        self.connection = connection
        self.call = call
        self.is_lost = False
        self.requests: Requests
        self.task: asyncio.Task[None]
        self._ended = False

    def start(self, server: Process, handler: Callable[[], Any]) -> None:
        """Run ``handler`` (a coroutine function that returns the intercepted method) in the server's context."""
        self.requests = Requests(None, lambda wire: self.network.history.consumed(self.call, wire))
        self.task = self.network.loop.create_task(self._run(handler), context=server.context.copy())

    async def _run(self, find: Callable[[], Any]) -> None:
        handler = await find()
        self.requests._parse = handler.request_deserializer or (lambda wire: wire)
        context = ServicerContext(self, handler.response_serializer)
        streams = (
            "stream" if handler.request_streaming else "unary",
            "stream" if handler.response_streaming else "unary",
        )
        method = getattr(handler, "_".join(streams))
        try:
            request = self.requests if handler.request_streaming else await anext(self.requests)
            answer = await method(request, context)
            if not handler.response_streaming:
                await context.write(answer)
        except (grpc.aio.AbortError, asyncio.CancelledError):  # type: ignore[attr-defined]
            return
        except StopAsyncIteration:
            return
        self.end(grpc.StatusCode.OK, "", ())

    def end(self, code: grpc.StatusCode, details: str, trailing: tuple[tuple[str, bytes], ...]) -> None:
        """Send the call's end."""
        if not self._ended:
            self._ended = True
            self.network.history.ended(self.call, code, trailing)
            self.connection.served.pop(self.call, None)
            self.connection.send(1, OVERHEAD + 200, lambda: self.call.finished(code, details, trailing))

    def lost(self) -> None:
        """The client is gone: by chance the servicer first sees the end of the requests, as with gRPC."""
        self.is_lost = True
        self.network.history.ready.pop(self.call, None)
        if self.network.chance.random() < 0.3:
            self.requests.arrived(None)
            self.network.later(self.network.chance.uniform(0, 0.01), self.task.cancel)
        else:
            self.task.cancel()


async def unary(call: Call, request: object) -> Any:  # noqa: ANN401
    """Make a unary call; raises grpc.aio.AioRpcError."""
    try:
        answer = await call.ask(request).read()
        if answer is grpc.aio.EOF:
            raise AssertionError("a unary call ended without an answer and without an error")
        await call.read()  # its status
        return answer
    finally:
        call.cancel()
