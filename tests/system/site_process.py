"""A real ``fsllm-client`` daemon for system tests: enrolled with a real join file, watched through its log.

with ServerProcess(tmp_path / "server") as server, SiteProcess(server, tmp_path / "a", data) as site:
    site.await_log("attached")
"""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.system.harness import ServerProcess

from fsllm_common.identity.join import JoinFile, write_join_file
from fsllm_common.identity.names import Role

END_SECONDS = 60.0


def join_file(server: ServerProcess, name: str, path: Path, role: str = "site") -> Path:
    """Invite a member and write its join file."""
    invitation = server.invite(name, role)
    write_join_file(
        path,
        JoinFile(
            federation=invitation.federation,
            role=Role(role),
            name=name,
            host="localhost",
            port=invitation.port,
            enrollment_port=invitation.enrollment_port,
            ca_certificate=invitation.ca_certificate.decode(),
            token=invitation.token,
            expires=invitation.expires.ToDatetime().astimezone(),
        ),
    )
    return path


class SiteProcess:
    """A daemon over the state folder ``state``, whose last part is the member's name."""

    def __init__(self, server: ServerProcess, state: Path, data: Path, *arguments: str, role: str = "site") -> None:
        self.server = server
        self.state = state
        self.name = state.name
        self._data = data
        self._arguments = arguments
        self._role = role
        self._process: subprocess.Popen[bytes] | None = None
        self.environment: dict[str, str] = {}
        """Variables of the next start, besides this process's own."""

    def __enter__(self) -> Self:
        state = self.state
        state.mkdir(parents=True, exist_ok=True)
        join = join_file(self.server, self.name, state.with_name(f"{state.name}.join"), self._role)
        self.start("--join", str(join))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is not None and self._process.poll() is None:
            self.stop()

    def start(self, *more: str) -> None:
        """Start it; ``more`` arguments count for this start only."""
        command = [
            *(sys.executable, "-c", "from fsllm_client.cli import main; main()"),
            *("--server", self.server.address, "--data", str(self._data), "--state-dir", str(self.state)),
            *("--log-format", "json", *self._arguments, *more),
        ]
        with self.log_file.open("ab") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env={**os.environ, **self.environment}
            )

    def stop(self) -> int:
        """Send SIGTERM and return the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(END_SECONDS)

    def kill(self) -> None:
        """Send SIGKILL and wait for the end."""
        self.process.kill()
        self.process.wait(END_SECONDS)

    def wait(self) -> int:
        """Wait for its own end and return the exit code."""
        return self.process.wait(END_SECONDS)

    @property
    def process(self) -> subprocess.Popen[bytes]:
        """The process that was started last."""
        assert self._process is not None
        return self._process

    @property
    def log_file(self) -> Path:
        """Where its log goes."""
        return self.state.with_name(f"{self.state.name}.log")

    @property
    def log(self) -> str:
        """Everything it wrote."""
        return self.log_file.read_text()

    def await_log(self, event: str, times: int = 1, key: str = "event") -> dict[str, Any]:
        """Wait until the log holds the event so many times, from its beginning, and return the last of these lines.

        Or so many lines with another ``key`` of this value.
        """
        command = ["tail", "-n", "+1", "-F", f"--pid={self.process.pid}", str(self.log_file)]
        # Whoever ends is reaped at once: for tail a zombie is still there.
        threading.Thread(target=self.process.wait, daemon=True).start()
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as tail:
            assert tail.stdout is not None
            try:
                for line in tail.stdout:
                    found: dict[str, Any] = json.loads(line) if line.startswith("{") else {}
                    if found.get(key) == event:
                        times -= 1
                        if not times:
                            return found
            finally:
                tail.kill()
        raise AssertionError(f"{self.name} has ended without {event!r}:\n{self.log}")

    def memory(self) -> int:
        """Return its resident memory in bytes."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
