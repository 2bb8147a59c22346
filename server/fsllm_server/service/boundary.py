"""Between gRPC and the servicers: whatever a call ends with becomes the status that the caller sees."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractContextManager, aclosing, asynccontextmanager, nullcontext
from typing import Any, TypeAlias

import grpc
from google.protobuf.message import DecodeError

from fsllm_common.errors import FsllmError, Refused
from fsllm_common.failpoints import reach
from fsllm_common.rpc_errors import abort
from fsllm_common.telemetry.logs import get_logger
from fsllm_common.telemetry.metrics import ServerMetrics

log = get_logger()

# Quoted: at run time gRPC's classes are not generic.
Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"


class _Collector:
    """Takes the place of a server while generated code registers its handlers."""

    def __init__(self) -> None:
        self.handlers: dict[str, Handler] = {}

    def add_generic_rpc_handlers(self, handlers: object) -> None:
        """Ignore the same handlers in their other form."""

    def add_registered_method_handlers(self, service: str, handlers: dict[str, Handler]) -> None:
        """Keep the handlers by their methods' names."""
        self.handlers.update(handlers)


def register(
    server: grpc.aio.Server,
    service: str,
    servicer: object,
    add_generated: Callable[[Any, Any], None],
    raw: Mapping[str, Handler],
) -> None:
    """Add a servicer to a server: the methods in ``raw`` with those handlers, the others as generated.

    Args:
        server: Not yet started.
        service: The full name.
        servicer: The service's object.
        add_generated: The generated ``add_...Servicer_to_server``.
        raw: By method name; handlers of those that carry payloads, without gRPC's (de)serialisers.

    """
    collector = _Collector()
    add_generated(servicer, collector)
    handlers = {**collector.handlers, **raw}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))


class Boundary(grpc.aio.ServerInterceptor):
    """Turns our errors into statuses with their details, and bugs into INTERNAL with a number and no details."""

    def __init__(self, metrics: ServerMetrics) -> None:
        self._metrics = metrics

    def entered(self, method: str, context: Context) -> AbstractContextManager[None]:
        """Return what surrounds a call; may refuse it by raising a FsllmError."""
        return nullcontext()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        """Return the method's handler with this boundary around it."""
        handler: Any = await continuation(handler_call_details)
        if handler is None:  # gRPC answers UNIMPLEMENTED
            return None
        ends = [("unary", "stream")[streams] for streams in (handler.request_streaming, handler.response_streaming)]
        make = getattr(grpc, f"{'_'.join(ends)}_rpc_method_handler")
        # Requests are decoded in here: gRPC would call bytes that are no message an INTERNAL error of ours.
        decode = _decoder(handler.request_deserializer, streams=handler.request_streaming)
        wrapped: Handler = make(
            self._around(handler_call_details.method, decode, getattr(handler, "_".join(ends))),
            response_serializer=handler.response_serializer,
        )
        return wrapped

    def _around(
        self, method: str, decode: Callable[[Any], Any], inner: Callable[[Any, Context], Any]
    ) -> Callable[[Any, Context], Awaitable[Any]]:
        async def call(request: Any, context: Context) -> Any:  # noqa: ANN401 - bytes, or a stream of them
            async with self._bounded(method, context):
                result = inner(decode(request), context)
                if not isinstance(result, AsyncGenerator):
                    answer = await result
                    reach("answer.send")
                    return answer
                # Written here, not yielded to gRPC, so that whatever ends the call ends it inside this boundary.
                opened = False
                async with aclosing(result) as responses:
                    async for response in responses:
                        if not opened:
                            opened = await _open(context)
                        await context.write(response)
                        del response  # not kept while the next is waited for: a chunk is large, and callers are many
                return None

        return call

    @asynccontextmanager
    async def _bounded(self, method: str, context: Context) -> AsyncIterator[None]:
        try:
            with self.entered(method, context):
                yield
        except FsllmError as known:
            error = known
        except asyncio.CancelledError:
            self._count(method, "CANCELLED")
            raise
        except grpc.aio.AbortError:  # gRPC's own servicers answer for themselves
            raise
        except grpc.aio.InternalError:  # what was written found nobody: the caller has left
            self._count(method, "CANCELLED")
            return
        except Exception:
            number = secrets.token_hex(4)
            log.exception("a call failed by a bug", method=method, id=number)
            error = FsllmError("INTERNAL", f"The server could not do this; its log says more under {number}")
        else:
            self._count(method, "OK")
            return
        self._count(method, error.reason)
        log.debug("call ended", method=method, reason=error.reason, error=error.message)
        await abort(context, error)

    def _count(self, method: str, reason: str) -> None:
        self._metrics.calls.labels(method.rpartition("/")[2], reason).inc()


async def _open(context: Context) -> bool:
    """Send the response's headers, and hold back a cancellation meanwhile.

    Cancelled halfway, gRPC forgets that they are sent, sends them again with the status, and loses both.
    """
    sending = asyncio.ensure_future(context.send_initial_metadata(()))
    try:
        await asyncio.shield(sending)
    except asyncio.CancelledError:
        await asyncio.gather(sending, return_exceptions=True)
        raise
    return True


def _decoder(deserialize: Callable[[bytes], Any] | None, *, streams: bool) -> Callable[[Any], Any]:
    """Return what turns a request's bytes, or a stream of them, into what the servicer takes."""
    if deserialize is None:
        return lambda request: request

    def decode(wire: bytes) -> Any:  # noqa: ANN401 - any message
        try:
            return deserialize(wire)
        except DecodeError as error:
            raise Refused("MESSAGE_INVALID", f"The request of {len(wire)} bytes is not of the contract") from error

    async def decode_all(wires: AsyncIterator[bytes]) -> AsyncGenerator[Any]:
        async for wire in wires:
            yield decode(wire)

    return decode_all if streams else decode
