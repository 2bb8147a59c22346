"""Errors through a real grpc.aio call and back."""

from typing import Any

import grpc
import pytest
from google.rpc.error_details_pb2 import ErrorInfo  # type: ignore[import-untyped]
from hypothesis import given
from hypothesis import strategies as st

from fsllm.v1 import federation_pb2, federation_pb2_grpc
from fsllm_common.errors import ERROR_DOMAIN, REASONS, FsllmError, Refused, Unavailable
from fsllm_common.rpc_errors import abort, error_from, status_from


class Thrower(federation_pb2_grpc.FederationServiceServicer):
    def __init__(self, error: FsllmError | None) -> None:
        self.error = error

    async def Renew(self, request: federation_pb2.RenewRequest, context: Any) -> federation_pb2.RenewResponse:  # noqa: ANN401, N802 (gRPC's)
        assert self.error is not None
        await abort(context, self.error)


async def through_the_wire(error: FsllmError) -> tuple[grpc.StatusCode, FsllmError]:
    server = grpc.aio.server()
    federation_pb2_grpc.add_FederationServiceServicer_to_server(Thrower(error), server)  # type: ignore[abstract]
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await federation_pb2_grpc.FederationServiceStub(channel).Renew(
                    federation_pb2.RenewRequest(), timeout=10
                )
            return caught.value.code(), error_from(caught.value)
    finally:
        await server.stop(None)


@pytest.mark.parametrize(
    "error",
    [
        FsllmError("NOT_ENROLLED", "Nobody knows you"),
        FsllmError("BUSY", "Queue is full", retry_after=2.5),
        FsllmError("DISK_FULL", "No space for /état", cure="Räum auf"),
        FsllmError("PLAN_INVALID", "multi\nline\ttext"),
    ],
)
async def test_an_error_survives_the_wire(error: FsllmError) -> None:
    code, back = await through_the_wire(error)
    assert code.name == REASONS[error.reason].status
    assert (back.reason, back.message, back.cure, back.retry_after) == (
        error.reason,
        error.message,
        error.cure,
        error.retry_after,
    )
    assert isinstance(back, Unavailable if error.reason in ("BUSY", "DISK_FULL") else Refused)


async def test_a_message_that_is_too_large_is_not_sent_for_ever() -> None:
    """By either end's limit, gRPC says what it also says of a server that is full."""

    class Generous(Thrower):
        async def Renew(self, request: federation_pb2.RenewRequest, context: Any) -> federation_pb2.RenewResponse:  # noqa: ANN401, N802 (gRPC's)
            return federation_pb2.RenewResponse(certificate_chain=b"x" * 5000)

    server = grpc.aio.server(options=[("grpc.max_receive_message_length", 1000)])
    federation_pb2_grpc.add_FederationServiceServicer_to_server(Generous(None), server)  # type: ignore[abstract]
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        limit = [("grpc.max_receive_message_length", 1000)]
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=limit) as channel:
            renew = federation_pb2_grpc.FederationServiceStub(channel).Renew
            for request in (federation_pb2.RenewRequest(csr=b"x" * 2000), federation_pb2.RenewRequest()):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await renew(request, timeout=10)
                assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
                error = error_from(caught.value)
                assert (error.reason, type(error)) == ("MESSAGE_INVALID", Refused)
    finally:
        await server.stop(None)


async def test_a_very_long_message_still_arrives() -> None:
    _, back = await through_the_wire(FsllmError("PLAN_INVALID", "x" * 100_000, cure="ü" * 100_000))
    assert back.reason == "PLAN_INVALID"
    assert 500 < len(back.message) < 2000
    assert back.message.endswith("...")


@given(st.sampled_from(sorted(REASONS)))
def test_every_reason_has_a_status_with_details(reason: str) -> None:
    status = status_from(FsllmError(reason, "what"))
    assert status.code == grpc.StatusCode[REASONS[reason].status].value[0]
    info = ErrorInfo()
    assert status.details[0].Unpack(info)
    assert (info.domain, info.reason, info.metadata["cure"]) == (ERROR_DOMAIN, reason, REASONS[reason].cure)
    assert len(status.details) == 1


class Bare(grpc.RpcError):
    def __init__(self, code: grpc.StatusCode, metadata: tuple[tuple[str, bytes], ...] | None = None) -> None:
        super().__init__()
        self._code, self._metadata = code, metadata

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str:
        return "Socket closed"

    def trailing_metadata(self) -> Any:  # noqa: ANN401
        return self._metadata


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (grpc.StatusCode.UNAVAILABLE, "SERVER_UNREACHABLE"),
        (grpc.StatusCode.DEADLINE_EXCEEDED, "SERVER_UNREACHABLE"),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "BUSY"),
        (grpc.StatusCode.UNIMPLEMENTED, "PROTOCOL_VERSION"),
        (grpc.StatusCode.UNKNOWN, "INTERNAL"),
    ],
)
def test_a_bare_status_has_a_reason_too(code: grpc.StatusCode, reason: str) -> None:
    error = error_from(Bare(code), "server.example:1")
    assert error.reason == reason
    assert "server.example:1: Socket closed" in error.message


def test_an_unknown_reason_of_a_newer_server_is_shown_and_does_not_crash() -> None:
    status = status_from(FsllmError("BUSY", "new trouble"))
    info = ErrorInfo(domain=ERROR_DOMAIN, reason="BRAND_NEW", metadata={"cure": "Upgrade."})
    status.details[0].Pack(info)
    error = error_from(Bare(grpc.StatusCode.ABORTED, (("grpc-status-details-bin", status.SerializeToString()),)))
    assert error.reason == "INTERNAL"
    assert "BRAND_NEW" in error.message
    assert error.cure == "Upgrade."


def test_damaged_details_do_not_crash() -> None:
    error = error_from(Bare(grpc.StatusCode.UNAVAILABLE, (("grpc-status-details-bin", b"\xff\xff"),)))
    assert error.reason == "SERVER_UNREACHABLE"
