"""The Attach stream: orders out, answers in, and a watch on silence.

The engine's session pushes; this pumps the two directions of the stream until one of them ends.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Final

from fsllm.v1.federation_pb2 import AttachRequest, AttachResponse, Hello, Welcome
from fsllm_common import PROTOCOL_VERSION, PROTOCOL_VERSION_MIN, __version__
from fsllm_common.errors import FsllmError, Refused, Unavailable
from fsllm_common.identity.names import Member
from fsllm_common.telemetry.logs import get_logger
from fsllm_common.telemetry.metrics import ServerMetrics
from fsllm_server.engine.engine import Engine
from fsllm_server.service.rates import Rate
from fsllm_server.service.screening import screen_attach

log = get_logger()

HELLO_SECONDS: Final = 10.0
SILENCE_SECONDS: Final = 45.0
"""Three heartbeats."""


async def greeting(requests: AsyncIterator[AttachRequest]) -> Hello:
    """Return the Hello that must come first.

    Raises:
        Refused: HELLO_EXPECTED, MESSAGE_INVALID, PROTOCOL_VERSION.

    """
    try:
        async with asyncio.timeout(HELLO_SECONDS):
            first = await anext(requests, None)
    except TimeoutError:
        raise Refused("HELLO_EXPECTED", f"No Hello within {HELLO_SECONDS:.0f} seconds") from None
    if first is None or first.WhichOneof("kind") != "hello":
        raise Refused("HELLO_EXPECTED", "The first message of Attach must be Hello")
    screen_attach(first)
    if not PROTOCOL_VERSION_MIN <= first.hello.protocol_version <= PROTOCOL_VERSION:
        spoken = f"{first.hello.protocol_version} (fsllm {first.hello.software_version})"
        accepted = f"{PROTOCOL_VERSION_MIN} to {PROTOCOL_VERSION} (fsllm {__version__})"
        raise Refused("PROTOCOL_VERSION", f"The daemon speaks protocol {spoken}; the server accepts {accepted}")
    return first.hello


class Attachments:
    """The live Attach streams: at most one a member."""

    def __init__(self, engine: Engine, metrics: ServerMetrics, messages_per_second: float = 200) -> None:
        self._engine = engine
        self._messages = Rate(messages_per_second, burst=20 * messages_per_second)
        self._metrics = metrics
        self._hellos: dict[str, Hello] = {}

    def hello(self, member: str) -> Hello | None:
        """Return what an attached member said of itself; None when it is not attached."""
        return self._hellos.get(member)

    def __len__(self) -> int:
        """Return how many members are attached."""
        return len(self._hellos)

    async def serve(
        self, member: Member, hello: Hello, requests: AsyncIterator[AttachRequest]
    ) -> AsyncGenerator[AttachResponse]:
        """Attach a member and yield what goes to it until either side ends the stream.

        Raises:
            FsllmError: ATTACHED_ELSEWHERE, HELLO_EXPECTED (a second one), MESSAGE_INVALID, QUOTA_EXCEEDED,
                SERVER_UNREACHABLE (silence).

        """
        session = self._engine.attach(member.name, str(member.role), hello)
        listener = asyncio.create_task(_listen(self._engine, member.name, requests, self._messages))
        listener.add_done_callback(lambda _: session.close())
        self._hellos[member.name] = hello
        gauge = self._metrics.attached_members.labels(str(member.role))
        gauge.inc()
        log.info("attached", role=str(member.role), version=hello.software_version, held=len(hello.held_orders))
        try:
            yield AttachResponse(welcome=_welcome(member))
            async for response in session:
                yield response
            # The session ends quietly when the daemon has closed its half or has broken a rule; the latter is raised.
            if listener.done():
                listener.result()
        finally:
            listener.cancel()
            session.close()
            gauge.dec()
            if self._hellos.get(member.name) is hello:
                del self._hellos[member.name]
            log.info("detached")


def _welcome(member: Member) -> Welcome:
    return Welcome(
        federation=member.federation,
        member=member.name,
        role=str(member.role),
        protocol_version_min=PROTOCOL_VERSION_MIN,
        protocol_version_max=PROTOCOL_VERSION,
        software_version=__version__,
    )


async def _listen(engine: Engine, member: str, requests: AsyncIterator[AttachRequest], messages: Rate) -> None:
    """Hand over what the daemon says, until it closes its half.

    Raises:
        FsllmError: HELLO_EXPECTED, MESSAGE_INVALID, QUOTA_EXCEEDED, SERVER_UNREACHABLE.

    """
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(SILENCE_SECONDS) as silence:
            while (request := await anext(requests, None)) is not None:
                silence.reschedule(loop.time() + SILENCE_SECONDS)
                if wait := messages.wait(member):
                    message = f"{member} says too much on Attach (--messages-per-second)"
                    raise Unavailable("QUOTA_EXCEEDED", message, retry_after=max(5.0, wait))
                screen_attach(request)
                await _hear(engine, member, request)
    except TimeoutError:
        message = f"Nothing was heard for {SILENCE_SECONDS:.0f} seconds, not even a heartbeat"
        raise Unavailable("SERVER_UNREACHABLE", message, retry_after=1.0) from None


async def _hear(engine: Engine, member: str, request: AttachRequest) -> None:
    match request.WhichOneof("kind"):
        case "answer":
            try:
                await engine.answer(member, request.answer)
            except FsllmError as error:
                if error.reason != "ORDER_UNKNOWN":
                    raise
                # The order was withdrawn while its answer was on its way; the daemon has been told so already.
                log.debug("answer to an order that is no longer wanted", order=request.answer.order_id)
        case "progress":
            engine.progress(member, request.progress)
        case "heartbeat":
            pass
        case _:
            raise Refused("HELLO_EXPECTED", "Hello comes once, and nothing unknown after it")
