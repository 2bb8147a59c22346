"""A real server process for system tests: started on free ports, reached over real mutual TLS, members really enrolled.

    with ServerProcess(tmp_path / "server") as server:
        site = server.enroll("hospital-a")               # a Credential, through Invite and Redeem
        with server.channel(site) as channel: ...        # grpc.Channel; server.aio_channel(site) for asyncio
        server.control().ListMembers(...)                # as the operator of the server's host

Nothing here sleeps: a start is over when the server has said READY=1 by systemd's notification protocol, or has ended.
"""

import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import grpc

from fsllm.v1.control_pb2 import InviteRequest, InviteResponse
from fsllm.v1.control_pb2_grpc import ControlServiceStub
from fsllm.v1.enrollment_pb2 import RedeemRequest
from fsllm.v1.enrollment_pb2_grpc import EnrollmentServiceStub
from fsllm_common.errors import FsllmError
from fsllm_common.identity.credentials import CHANNEL_OPTIONS, channel_credentials, enrollment_channel_credentials
from fsllm_common.identity.keys import Credential, accept_chain, load_credential, make_key, make_request
from fsllm_common.rpc_errors import error_from

START_SECONDS = 60.0
CALL_SECONDS = 30.0


class ServerEnded(Exception):
    """The server ended instead of serving. ``code`` is its exit code, ``log`` what it wrote to standard error."""

    def __init__(self, code: int, log: str) -> None:
        super().__init__(f"exit code {code}\n{log}")
        self.code = code
        self.log = log


class ServerProcess:
    """``fsllm-server`` on free ports (unless ``arguments`` say others) over the state folder ``state``."""

    module = "fsllm_server"

    def __init__(self, state: Path, *arguments: str, environment: Mapping[str, str] | None = None) -> None:
        self.state = state
        self._arguments = arguments
        self.environment = dict(environment or {})
        """Variables of the next start."""
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is not None and self._process.poll() is None:
            self.kill()

    # The process.

    def start(self) -> None:
        """Start it and return when it serves.

        Raises:
            ServerEnded: It ended instead.

        """
        self.state.parent.mkdir(parents=True, exist_ok=True)
        command = [
            *(sys.executable, "-m", self.module),
            *("--port", "0", "--metrics-port", "0", "--state-dir", str(self.state), *self._arguments),
        ]
        with (
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notices,
            self.output.open("ab") as output,
            self._log.open("ab") as log,
        ):
            # An abstract name: the path of a test's folder may be longer than a socket's name may be.
            name = f"fsllm-test-{os.getpid()}-{id(self):x}-{self.state.name}"
            notices.bind(f"\0{name}")
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=log,
                env={**os.environ, **self.environment, "NOTIFY_SOCKET": f"@{name}"},
            )
            self._await_ready(notices)

    def stop(self) -> int:
        """Send SIGTERM, wait for the end, and return the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(START_SECONDS)

    def kill(self) -> None:
        """Send SIGKILL and wait for the end."""
        self.process.kill()
        self.process.wait(START_SECONDS)

    def restart(self) -> None:
        """Start it again after ``stop`` or ``kill``, on the same ports, so that clients find it."""
        told = self.told
        self._arguments = (
            *self._arguments,
            *("--port", str(told["port"]), "--enrollment-port", str(told["enrollment_port"])),
        )
        self.start()

    @property
    def process(self) -> subprocess.Popen[bytes]:
        """The process that was started last."""
        assert self._process is not None
        return self._process

    @property
    def log(self) -> str:
        """Everything written to standard error."""
        return self._log.read_text()

    @property
    def output(self) -> Path:
        """The file of standard output."""
        return self.state.with_name(f"{self.state.name}.out")

    @property
    def told(self) -> dict[str, Any]:
        """What ``server.json`` said at the last start."""
        return self._told

    @property
    def port(self) -> int:
        """The main port."""
        return int(self.told["port"])

    @property
    def address(self) -> str:
        """host:port of the main port."""
        return f"localhost:{self.port}"

    @property
    def metrics_url(self) -> str:
        """Where the web port answers; add a path."""
        return f"http://127.0.0.1:{self.told['metrics_port']}"

    # Members.

    def operator(self) -> Credential:
        """Return the credential of this host's operator."""
        return load_credential(self.state / "operator")

    def invite(self, name: str, role: str = "site", valid_seconds: int = 600) -> InviteResponse:
        """Make a join token."""
        return self.control().Invite(
            InviteRequest(name=name, role=role, valid_seconds=valid_seconds), timeout=CALL_SECONDS
        )

    def redeem(self, invitation: InviteResponse, key: bytes | None = None) -> Credential:
        """Exchange a join token for a credential with a new key, or the given one."""
        key = key or make_key()
        target = f"localhost:{invitation.enrollment_port}"
        credentials = enrollment_channel_credentials(invitation.ca_certificate)
        with grpc.secure_channel(target, credentials, CHANNEL_OPTIONS) as channel:
            answer = EnrollmentServiceStub(channel).Redeem(
                RedeemRequest(token=invitation.token, csr=make_request(key)), timeout=CALL_SECONDS
            )
        return accept_chain(key, answer.certificate_chain, invitation.ca_certificate)

    def enroll(self, name: str, role: str = "site") -> Credential:
        """Invite a member and redeem its token."""
        return self.redeem(self.invite(name, role))

    def control(self, credential: Credential | None = None) -> ControlServiceStub:
        """Return the operators' stub; as this host's operator unless a credential is given."""
        return ControlServiceStub(self.channel(credential or self.operator()))

    def channel(self, credential: Credential) -> grpc.Channel:
        """Return a channel to the main port."""
        return grpc.secure_channel(self.address, channel_credentials(credential), CHANNEL_OPTIONS)

    def aio_channel(self, credential: Credential) -> grpc.aio.Channel:
        """Return an asyncio channel to the main port."""
        return grpc.aio.secure_channel(self.address, channel_credentials(credential), options=CHANNEL_OPTIONS)

    def await_log(self, text: str) -> str:
        """Wait for a line of the log that holds ``text``, from the log's beginning, and return it."""
        command = ["tail", "-n", "+1", "-F", f"--pid={self.process.pid}", str(self._log)]
        # Whoever ends is reaped at once: for tail a zombie is still there.
        threading.Thread(target=self.process.wait, daemon=True).start()
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as tail:
            assert tail.stdout is not None
            try:
                for line in tail.stdout:
                    if text in line:
                        return line
            finally:
                tail.kill()
        raise AssertionError(f"the server has ended without a line about {text!r}:\n{self.log}")

    @property
    def _log(self) -> Path:
        return self.state.with_name(f"{self.state.name}.log")

    def _await_ready(self, notices: socket.socket) -> None:
        ended = os.pidfd_open(self.process.pid)
        try:
            ready, _, _ = select.select([notices.fileno(), ended], [], [], START_SECONDS)
            if notices.fileno() not in ready:
                if ended not in ready:
                    self.kill()
                raise ServerEnded(self.process.wait(START_SECONDS), self.log)
            assert notices.recv(64) == b"READY=1"
        finally:
            os.close(ended)
        self._told: dict[str, Any] = json.loads((self.state / "server.json").read_text())


def reason_of(error: grpc.RpcError) -> str:
    """Return the reason that a failed call carries."""
    return meaning_of(error).reason


def meaning_of(error: grpc.RpcError) -> FsllmError:
    """Return what a failed call means."""
    return error_from(error)
