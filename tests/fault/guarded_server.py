"""A server with low quotas, for tests of abuse, and a witness that others are served meanwhile."""

from collections.abc import Callable
from pathlib import Path
from uuid import uuid4

from tests.system.harness import CALL_SECONDS, ServerProcess

from fsllm.v1 import control_pb2 as control
from fsllm.v1.control_pb2_grpc import ControlServiceStub
from fsllm_common.identity.keys import Credential

MIB = 1 << 20
CONNECTIONS = 2100
CALLS = 40
STALL = 2.0
PATIENCE = 40.0
"""Seconds until a socket that the server should close fails the test."""


def guarded(folder: Path) -> ServerProcess:
    """Return a server that is not started yet."""
    return ServerProcess(
        folder / "server",
        *("--max-connections", str(CONNECTIONS), "--calls-per-member", str(CALLS), "--calls-per-minute", "1200"),
        *("--upload-stall-seconds", str(STALL), "--transfer-least-rate", str(4 * MIB)),
        *("--messages-per-second", "20", "--join-attempts-per-minute", "30", "--uploads-at-once", "2"),
    )


def witness(server: ServerProcess) -> Callable[[], None]:
    """Return a check that somebody else is served, on a connection there was before and on a new one."""
    credential = server.enroll(f"witness-{uuid4().hex[:8]}", "operator")
    stub = server.control(credential)
    ask = control.GetServerRequest()
    stub.GetServer(ask, timeout=CALL_SECONDS)

    def check() -> None:
        assert stub.GetServer(ask, timeout=CALL_SECONDS).federation == "fsllm"
        with server.channel(credential) as channel:
            assert ControlServiceStub(channel).GetServer(ask, timeout=CALL_SECONDS).federation == "fsllm"

    return check


def member(server: ServerProcess, role: str = "site") -> Credential:
    return server.enroll(f"{role}-{uuid4().hex[:8]}", role)
