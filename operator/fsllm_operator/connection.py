"""The operator's channel to the server: calls that raise our errors, and streams that outlive a server's restart."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Final, Self, TypeVar

import grpc

from fsllm.v1.control_pb2 import (
    RUN_STATUS_CANCELLED,
    RUN_STATUS_DONE,
    ExportRunRequest,
    GetRunRequest,
    ListManifestsRequest,
    RoundManifest,
    Run,
    WatchRunRequest,
    WatchRunResponse,
)
from fsllm.v1.control_pb2_grpc import ControlServiceStub
from fsllm.v1.federation_pb2_grpc import FederationServiceStub
from fsllm_common.errors import FsllmError, Refused, Unavailable
from fsllm_common.identity.credentials import CHANNEL_OPTIONS, channel_credentials
from fsllm_common.identity.keys import Credential
from fsllm_common.rpc_errors import error_from

CALL_SECONDS: Final = 20.0
_STREAM_SECONDS: Final = 120.0
_PAUSE_SECONDS: Final = 1.0
_MAX_MESSAGE: Final = 256 * 1024 * 1024
"""Bytes. A run of thousands of rounds and dozens of sites is told in one message, by a server that operators trust."""
_OPTIONS: Final = (
    *(option for option in CHANNEL_OPTIONS if option[0] != "grpc.max_receive_message_length"),
    ("grpc.max_receive_message_length", _MAX_MESSAGE),
    # After a server's restart try again every second or two: the default backs off to two minutes.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 2_000),
)

ENDED: Final = frozenset({RUN_STATUS_DONE, RUN_STATUS_CANCELLED})
"""The statuses of a run that has ended."""

Request = TypeVar("Request")
Response = TypeVar("Response")


class Connection:
    """A mutually authenticated channel to one server, for the length of a ``with`` block."""

    def __init__(self, server: str, credential: Credential) -> None:
        self.server = server
        self.credential = credential
        self._channel = grpc.secure_channel(server, channel_credentials(credential), _OPTIONS)
        self.control = ControlServiceStub(self._channel)
        self.federation = FederationServiceStub(self._channel)
        # Chunks are parsed by hand (fsllm_common.tensors.chunks): bytes come out.
        self.exports: grpc.UnaryStreamMultiCallable[ExportRunRequest, bytes] = self._channel.unary_stream(
            "/fsllm.v1.ControlService/ExportRun", request_serializer=ExportRunRequest.SerializeToString
        )
        self._stream: grpc.Call | None = None
        self._interrupted = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._channel.close()

    def call(
        self, method: "grpc.UnaryUnaryMultiCallable[Request, Response]", request: Request, *, repeat: bool = False
    ) -> Response:
        """Make a call and return its answer.

        Args:
            method: Of ``control`` or ``federation``.
            request: What to send.
            repeat: The call is safe to make again: when it was sent and its outcome is unknown, wait for the server and
                repeat it once.

        Raises:
            FsllmError: What the server answered, or that it can not be reached.

        """
        try:
            return method(request, timeout=CALL_SECONDS)
        except grpc.RpcError as error:
            meaning = explain(error, self.server)
            if not (repeat and isinstance(meaning, Unavailable)) or _never_sent(error):
                raise meaning from error
        try:
            return method(request, timeout=CALL_SECONDS, wait_for_ready=True)
        except grpc.RpcError as error:
            raise explain(error, self.server) from error

    def run(self, run: str) -> Run:
        """Return a run by id, unique prefix, or unique name.

        Raises:
            FsllmError: RUN_UNKNOWN, or the server can not be reached.

        """
        return self.call(self.control.GetRun, GetRunRequest(run_id=run), repeat=True).run

    def manifests(self, run_id: str) -> list[RoundManifest]:
        """Return the manifests of a run's committed rounds, from round 0 on; none when the server keeps none (0.1.0).

        Raises:
            FsllmError: RUN_UNKNOWN, or the server can not be reached.

        """
        try:
            stream = self.control.ListManifests(ListManifestsRequest(run_id=run_id), timeout=_STREAM_SECONDS)
            return [response.manifest for response in stream]
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.UNIMPLEMENTED:
                return []
            raise explain(error, self.server) from error

    def watch(
        self, run_id: str, after: int = 0, *, lost: Callable[[FsllmError], None] = lambda _: None
    ) -> Iterator[WatchRunResponse]:
        """Yield a run's recorded events, then what happens, until it ends; across restarts of the server.

        Args:
            run_id: Which run.
            after: Only what comes after this sequence.
            lost: Called whenever the stream broke and is about to be taken up again.

        Raises:
            FsllmError: RUN_UNKNOWN and the like; that the server can not be reached is waited out.

        """
        while True:
            try:
                self._stream = stream = self.control.WatchRun(
                    WatchRunRequest(run_id=run_id, after_sequence=after), wait_for_ready=True
                )
                for event in stream:
                    after = max(after, event.sequence)
                    yield event
                # The stream also ends when the server stops.
                if self.run(run_id).status in ENDED:
                    return
                meaning: FsllmError = Unavailable("SERVER_STOPPING", f"The server at {self.server} stops")
            except grpc.RpcError as error:
                if self._interrupted:
                    raise KeyboardInterrupt from None
                meaning = explain(error, self.server)
            except Unavailable as error:
                meaning = error
            if not isinstance(meaning, Unavailable):
                raise meaning
            lost(meaning)
            wait(meaning)

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """See to it that Ctrl-C ends ``watch``.

        Python raises KeyboardInterrupt wherever the program stands. gRPC's compiled parts swallow it when that is in
        one of them, so the stream is cancelled too.
        """

        def interrupt(number: int, frame: FrameType | None) -> None:
            self._interrupted = True
            if self._stream is not None:
                self._stream.cancel()
            signal.default_int_handler(number, frame)

        previous = signal.signal(signal.SIGINT, interrupt)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, previous)


def wait(error: FsllmError) -> None:
    """Let the time pass that the server asked for before it is called again; Ctrl-C ends it."""
    threading.Event().wait(error.retry_after or _PAUSE_SECONDS)


def explain(error: grpc.RpcError, server: str) -> FsllmError:
    """Return what a failed call means, with TLS's and the network's words made plain."""
    meaning = error_from(error, server)
    if meaning.reason != "SERVER_UNREACHABLE":
        return meaning
    text = meaning.message
    if "CERTIFICATE_VERIFY_FAILED" in text:
        return Refused(
            "CERTIFICATE_UNTRUSTED", f"The server at {server} shows a certificate that our authority did not issue"
        )
    if "Hostname Verification Check failed" in text or "Peer name" in text:
        return Refused(
            "CERTIFICATE_UNTRUSTED",
            f"The server's certificate does not name the host of {server}",
            cure="Use a host name that the server knows, or start the server with that name as its public host.",
        )
    for words in ("Connection refused", "No route to host", "Network is unreachable", "Timeout", "Deadline", "DNS"):
        if words.lower() in text.lower():
            return Unavailable("SERVER_UNREACHABLE", f"The server at {server} can not be reached: {words.lower()}")
    return Unavailable("SERVER_UNREACHABLE", f"The server at {server} can not be reached: {_last(text)}")


def _never_sent(error: grpc.RpcError) -> bool:
    """Tell whether no connection came about, so that the server has certainly not acted."""
    return "failed to connect to all addresses" in str(error.details())


def _last(text: str) -> str:
    """Return the innermost of gRPC's nested messages."""
    return text.rpartition("last error: ")[2].removeprefix("UNKNOWN: ").strip() or text
