"""Our errors as gRPC statuses, and back.

A status carries google.rpc.ErrorInfo (domain, reason, and the cure in its metadata) and, where trying again makes
sense, google.rpc.RetryInfo.
"""

from typing import Any, Final, NoReturn, Protocol

import grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import DecodeError
from google.rpc.code_pb2 import Code  # type: ignore[import-untyped]
from google.rpc.error_details_pb2 import ErrorInfo, RetryInfo  # type: ignore[import-untyped]
from google.rpc.status_pb2 import Status  # type: ignore[import-untyped]

from fsllm_common.errors import ERROR_DOMAIN, REASONS, FsllmError, Refused, Unavailable

_DETAILS: Final = "grpc-status-details-bin"
_MAX_MESSAGE: Final = 1500
"""Characters of a message or cure. All of a call's metadata must fit 8 KiB, and the message travels twice."""

_AGAIN: Final = ("UNAVAILABLE", "RESOURCE_EXHAUSTED", "DATA_LOSS")

_UNTYPED: Final[dict[grpc.StatusCode, str]] = {
    grpc.StatusCode.UNAVAILABLE: "SERVER_UNREACHABLE",
    grpc.StatusCode.DEADLINE_EXCEEDED: "SERVER_UNREACHABLE",
    grpc.StatusCode.CANCELLED: "SERVER_UNREACHABLE",
    grpc.StatusCode.RESOURCE_EXHAUSTED: "BUSY",
    grpc.StatusCode.UNIMPLEMENTED: "PROTOCOL_VERSION",
}
"""What a status means that gRPC itself made, without our details."""

_BROKEN: Final = ("Internal error from Core", "RST_STREAM")
"""In the text of an INTERNAL that gRPC makes of a connection that broke under a call's hands."""

_TOO_LARGE: Final = "larger than max"
"""In the text of a RESOURCE_EXHAUSTED that gRPC makes of a message beyond an end's limit: it will be as large again."""


class AioContext(Protocol):
    """The part of an aio servicer context that ends a call."""

    async def abort(self, code: grpc.StatusCode, details: str = "", trailing_metadata: Any = ()) -> NoReturn:  # noqa: ANN401
        """End the call with a status."""


def status_from(error: FsllmError) -> Status:
    """Return the google.rpc.Status of an error."""
    message = _cut(error.message)
    status = Status(code=Code.Value(REASONS[error.reason].status), message=message)
    info = ErrorInfo(domain=ERROR_DOMAIN, reason=error.reason, metadata={"cure": _cut(error.cure)})
    status.details.add().Pack(info)
    if error.retry_after is not None:
        delay = Duration()
        delay.FromNanoseconds(round(error.retry_after * 1e9))
        status.details.add().Pack(RetryInfo(retry_delay=delay))
    return status


async def abort(context: AioContext, error: FsllmError) -> NoReturn:
    """End a call of a grpc.aio server with an error and its details."""
    status = status_from(error)
    code = grpc.StatusCode[REASONS[error.reason].status]
    await context.abort(code, _ascii(status.message), ((_DETAILS, status.SerializeToString()),))


def error_from(error: grpc.RpcError, peer: str = "the server") -> FsllmError:
    """Return what a failed call means: the server's own error, or what gRPC's bare status stands for.

    ``Unavailable`` when trying again may help, else ``Refused``. An unknown reason (of a newer server) becomes INTERNAL
    with the reason in its message.
    """
    code: grpc.StatusCode = error.code()
    text = str(error.details() or code.name)
    status, info, retry = _details(error.trailing_metadata() or ())
    if info.domain != ERROR_DOMAIN:
        if code is grpc.StatusCode.INTERNAL and any(words in text for words in _BROKEN):
            code = grpc.StatusCode.UNAVAILABLE
        if code is grpc.StatusCode.RESOURCE_EXHAUSTED and _TOO_LARGE in text:
            return _make("MESSAGE_INVALID", f"{peer}: {text}", "Send, or ask for, less in one message.", None)
        return _make(_UNTYPED.get(code, "INTERNAL"), f"{peer}: {text}", None, None)
    delay = retry.retry_delay.ToNanoseconds() / 1e9 if retry.HasField("retry_delay") else None
    if info.reason not in REASONS:
        return _make("INTERNAL", f"{status.message} [{info.reason}]", info.metadata.get("cure"), delay)
    return _make(info.reason, status.message, info.metadata.get("cure"), delay)


def _make(reason: str, message: str, cure: str | None, retry_after: float | None) -> FsllmError:
    kind = Unavailable if REASONS[reason].status in _AGAIN else Refused
    return kind(reason, message, cure=cure, retry_after=retry_after)


def _details(metadata: Any) -> tuple[Status, ErrorInfo, RetryInfo]:  # noqa: ANN401 (gRPC's several metadata types)
    """Return what the trailing metadata holds; empty messages where it holds none, or none that can be read."""
    status, info, retry = Status(), ErrorInfo(), RetryInfo()
    data = next((value for key, value in metadata if key == _DETAILS and isinstance(value, bytes)), b"")
    try:
        status.MergeFromString(data)
        for detail in status.details:
            detail.Unpack(info)
            detail.Unpack(retry)
    except DecodeError:
        return Status(), ErrorInfo(), RetryInfo()
    return status, info, retry


def _cut(text: str) -> str:
    return text if len(text) <= _MAX_MESSAGE else text[: _MAX_MESSAGE - 3] + "..."


def _ascii(text: str) -> str:
    """gRPC's own message is percent-encoded in the header: keep it short when it is not ASCII."""
    return text if text.isascii() else text.encode("ascii", "replace").decode()
