"""Daemons started as anyone would start them, waited for by their own word, and always ended."""

import os
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from types import FrameType, TracebackType
from typing import Self

from fsllm_common.errors import Unavailable

_READY_SECONDS = 60.0
_STOP_SECONDS = 20.0


def _leave(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def command(name: str) -> str:
    """Return the path of one of the three commands in the environment that runs the demo."""
    return str(Path(sysconfig.get_path("scripts")) / name)


class Daemons:
    """Child processes that all end with the ``with`` block, the last started first."""

    def __init__(self, logs: Path, environment: dict[str, str]) -> None:
        self._logs = logs
        self._environment = environment
        self._running: list[tuple[str, subprocess.Popen[bytes]]] = []
        logs.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> Self:
        # Python dies of SIGTERM without leaving its with blocks, which would leave the daemons behind.
        self._previous = signal.signal(signal.SIGTERM, _leave)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for _, process in reversed(self._running):
            process.send_signal(signal.SIGTERM)
        for _, process in reversed(self._running):
            try:
                process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        signal.signal(signal.SIGTERM, self._previous)

    def start(self, name: str, arguments: list[str], *, await_ready: bool = False) -> int:
        """Start a process whose output goes to ``logs/name.log`` and return its pid.

        With ``await_ready`` return only when the process has said READY=1 by systemd's notification protocol.

        Raises:
            Unavailable: The process ended, or did not get ready within a minute; names its log.

        """
        log = self._logs / f"{name}.log"
        environment = os.environ | self._environment
        with (
            tempfile.TemporaryDirectory(prefix="fsllm-") as folder,
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notices,
        ):
            if await_ready:
                environment["NOTIFY_SOCKET"] = str(Path(folder) / "notify")
                notices.bind(environment["NOTIFY_SOCKET"])
            with log.open("ab") as output:
                process = subprocess.Popen(
                    arguments,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    env=environment,
                    start_new_session=True,  # Ctrl-C reaches the demo alone, which then ends them in order
                )
            self._running.append((name, process))
            if await_ready:
                self._await_ready(name, process, notices, log)
        return process.pid

    def _await_ready(self, name: str, process: subprocess.Popen[bytes], notices: socket.socket, log: Path) -> None:
        waited = 0.0
        notices.settimeout(1.0)
        while waited < _READY_SECONDS:
            try:
                if b"READY=1" in notices.recv(4096):
                    return
            except TimeoutError:
                waited += 1.0
            if process.poll() is not None:
                break
        tail = log.read_text(errors="replace").strip().splitlines()[-3:]
        raise Unavailable(
            "SERVER_UNREACHABLE", f"{name} did not start: {' | '.join(tail)}", cure=f"Its whole log is {log}."
        )

    def check(self) -> None:
        """Raise when a daemon has ended.

        Raises:
            Unavailable: Names the daemon, its exit code and its log.

        """
        for name, process in self._running:
            if process.poll() is not None:
                raise Unavailable(
                    "SERVER_UNREACHABLE",
                    f"{name} ended with exit code {process.returncode}",
                    cure=f"Its log is {self._logs / name}.log.",
                )


def daemon_environment() -> dict[str, str]:
    """Return the variables by which the daemons find their commands and stay quiet in their logs."""
    return {
        "PYTHONWARNINGS": os.environ.get("PYTHONWARNINGS", "ignore"),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
    }
