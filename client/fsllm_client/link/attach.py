"""The Attach stream: orders come in, answers and progress go out, and a broken stream is opened again.

Final answers must not be lost with a stream. They are remembered by order until the daemon ends; an order is no longer
named in ``Hello.held_orders`` once it has its final answer, so a server that missed the answer sends the order again,
under the same id, and is answered at once from memory.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Iterable
from typing import Final, Protocol, TypeAlias

import grpc

from fsllm.v1.federation_pb2 import (
    Accepted,
    Answer,
    AttachRequest,
    AttachResponse,
    Capabilities,
    Heartbeat,
    Hello,
    Order,
    Progress,
    Welcome,
    Withdraw,
)
from fsllm_client.link.backoff import Backoff
from fsllm_client.link.channel import Link
from fsllm_common import PROTOCOL_VERSION, __version__
from fsllm_common.errors import FsllmError, Unavailable
from fsllm_common.identity.keys import check_credential
from fsllm_common.identity.probe import knock
from fsllm_common.rpc_errors import error_from
from fsllm_common.telemetry.logs import get_logger
from fsllm_common.telemetry.metrics import ClientMetrics

log = get_logger()

HEARTBEAT_SECONDS: Final = 15.0
WELCOME_SECONDS: Final = 30.0
REMEMBERED: Final = 256
"""Final answers."""

FATAL: Final = frozenset(
    {
        "ATTACHED_ELSEWHERE",
        "CERTIFICATE_EXPIRED",
        "CERTIFICATE_UNTRUSTED",
        "IDENTITY_MISSING",
        "MEMBER_REVOKED",
        "MEMBER_UNKNOWN",
        "NOT_ENROLLED",
        "PROTOCOL_VERSION",
        "ROLE_FORBIDDEN",
    }
)
"""Reasons with which the daemon ends, because waiting does not cure them. All others are tried again."""

_Stream: TypeAlias = "grpc.aio.StreamStreamCall[AttachRequest, AttachResponse]"


class Listener(Protocol):
    """Who does the work. Called in the event loop; must return at once."""

    def welcomed(self, welcome: Welcome) -> None:
        """The stream is up."""

    def ordered(self, order: Order) -> None:
        """The server wants this done; a held order comes only once."""

    def withdrawn(self, withdraw: Withdraw) -> None:
        """The server no longer wants it."""

    def held(self) -> Iterable[str]:
        """Return the ids of the orders in hand that have been accepted and have no final answer."""


class Attachment:
    """One member's stream of orders, through every reconnect."""

    def __init__(self, link: Link, listener: Listener, capabilities: Capabilities, metrics: ClientMetrics) -> None:
        self._link = link
        self._listener = listener
        self._capabilities = capabilities
        self._metrics = metrics
        self._outgoing: asyncio.Queue[AttachRequest] | None = None
        self._answered: OrderedDict[str, Answer] = OrderedDict()
        self._ever = False

    @property
    def attached(self) -> bool:
        """True between Welcome and the end of the stream."""
        return self._outgoing is not None

    def answer(self, answer: Answer) -> None:
        """Send an answer; a final one is sent again whenever its order comes again."""
        if answer.WhichOneof("outcome") != "accepted":
            self._answered[answer.order_id] = answer
            while len(self._answered) > REMEMBERED:
                self._answered.popitem(last=False)
        self._send(AttachRequest(answer=answer))

    def progress(self, progress: Progress) -> None:
        """Send progress; without a stream it is passed over."""
        self._send(AttachRequest(progress=progress))

    async def run(self) -> None:
        """Attach, and attach again, until cancelled.

        Raises:
            FsllmError: A reason of ``FATAL``.

        """
        backoff = Backoff()
        while True:
            try:
                # TLS itself would only say 'connection closed'.
                check_credential(self._link.credential)
                await self._attach_once(backoff)
                continue
            except FsllmError as known:
                error = await self._cause(known)
            if error.reason in FATAL:
                raise error
            seconds = backoff.wait(error.retry_after)
            log.warning(
                "not attached; trying again", reason=error.reason, error=error.message, wait_seconds=round(seconds, 1)
            )
            await self._pause(seconds)

    async def _cause(self, error: FsllmError) -> FsllmError:
        """Find out why nothing answers, as long as this daemon has never been welcomed; later it is only an outage."""
        if error.reason != "SERVER_UNREACHABLE" or self._ever:
            return error
        credential = self._link.credential
        try:
            await asyncio.to_thread(knock, self._link.server, credential.authority, credential)
        except FsllmError as cause:
            return cause
        return error

    async def _pause(self, seconds: float) -> None:
        """Wait before the next attempt, less when the certificate has just been renewed."""
        try:
            async with asyncio.timeout(seconds):
                await self._link.changed.wait()
        except TimeoutError:
            return

    async def _attach_once(self, backoff: Backoff) -> None:
        """Hold one stream; return when the link has a new channel.

        Raises:
            FsllmError: The stream ended.

        """
        self._link.changed.clear()
        call = self._link.stub.Attach()
        changed = asyncio.create_task(self._link.changed.wait())
        receiving = asyncio.create_task(self._converse(call, backoff))
        try:
            await asyncio.wait({changed, receiving}, return_when=asyncio.FIRST_COMPLETED)
            if receiving.done():
                await receiving
        except grpc.aio.AioRpcError as error:
            raise error_from(error, self._link.server) from error
        finally:
            for task in (changed, receiving):
                task.cancel()
            await asyncio.gather(changed, receiving, return_exceptions=True)
            call.cancel()

    async def _converse(self, call: _Stream, backoff: Backoff) -> None:
        hello = Hello(
            protocol_version=PROTOCOL_VERSION,
            software_version=__version__,
            held_orders=sorted(self._listener.held()),
            capabilities=self._capabilities,
        )
        try:
            async with asyncio.timeout(WELCOME_SECONDS):
                await call.write(AttachRequest(hello=hello))
                first = await call.read()
        except TimeoutError:
            raise Unavailable("SERVER_UNREACHABLE", f"{self._link.server} does not answer Hello") from None
        except asyncio.InvalidStateError:
            first = await call.read()  # raises why the server has ended the call
        if not isinstance(first, AttachResponse):
            raise self._closed()
        outgoing: asyncio.Queue[AttachRequest] = asyncio.Queue()
        for order_id in hello.held_orders:
            # The first acceptance may have been lost with the last stream, and a final answer that came about since
            # Hello was sent had no stream to go out on.
            answer = self._answered.get(order_id) or Answer(order_id=order_id, accepted=Accepted())
            outgoing.put_nowait(AttachRequest(answer=answer))
        self._outgoing = outgoing
        self._ever = True
        backoff.reset()
        self._metrics.attached.set(1)
        self._metrics.attaches.inc()
        sending = asyncio.create_task(_send_all(call, outgoing))
        try:
            self._take(first)
            while isinstance(response := await call.read(), AttachResponse):
                self._take(response)
            raise self._closed()
        finally:
            self._outgoing = None
            self._metrics.attached.set(0)
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)

    def _closed(self) -> FsllmError:
        return Unavailable("SERVER_STOPPING", f"{self._link.server} closed the stream")

    def _take(self, response: AttachResponse) -> None:
        match response.WhichOneof("kind"):
            case "welcome":
                self._listener.welcomed(response.welcome)
            case "order":
                known = self._answered.get(response.order.order_id)
                if known is not None:
                    self._send(AttachRequest(answer=known))
                else:
                    self._listener.ordered(response.order)
            case "withdraw":
                self._answered.pop(response.withdraw.order_id, None)
                self._listener.withdrawn(response.withdraw)

    def _send(self, request: AttachRequest) -> None:
        if self._outgoing is not None:
            self._outgoing.put_nowait(request)


async def _send_all(call: _Stream, outgoing: asyncio.Queue[AttachRequest]) -> None:
    """Write what is queued, and a heartbeat when there has been nothing for a while, until the stream ends."""
    try:
        while True:
            try:
                async with asyncio.timeout(HEARTBEAT_SECONDS):
                    request = await outgoing.get()
            except TimeoutError:
                request = AttachRequest(heartbeat=Heartbeat())
            await call.write(request)
    except (asyncio.InvalidStateError, grpc.aio.AioRpcError):
        return  # the reading side says why
