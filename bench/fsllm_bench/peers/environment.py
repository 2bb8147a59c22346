"""A peer's own virtual environment, and its processes: started, watched, ended."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

APPS: Final = Path(__file__).parent / "apps"
TENSORS: Final = 64
_STOP_SECONDS: Final = 30.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """What was measured of a peer's run."""

    ends: list[float]
    """When each round ended."""
    peak_mebibytes: float
    """Resident memory of all server processes together, at most."""


class Environment:
    """One virtual environment with one package in it."""

    def __init__(self, root: Path, package: str, version: str) -> None:
        """Make it unless it is there.

        Args:
            root: Where all peers' environments lie.
            package: From the package index.
            version: Pinned.

        """
        self.folder = root.resolve() / f"{package}-{version}"
        self.work = self.folder / "work"
        ready = self.folder / ".ready"
        if not ready.exists():
            subprocess.run([sys.executable, "-m", "venv", "--clear", self.folder], check=True)
            pip = [self.command("pip"), "install", "--quiet", "--disable-pip-version-check"]
            subprocess.run([*pip, f"{package}=={version}"], check=True)
            ready.touch()
        (self.work / "home").mkdir(parents=True, exist_ok=True)

    def command(self, name: str) -> str:
        """Return the path of one of its commands."""
        return str(self.folder / "bin" / name)

    def variables(self, **more: str) -> dict[str, str]:
        """Return the environment variables that its commands get: nothing is written outside its folder."""
        own = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
        return own | {
            "PATH": f"{self.folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
            "HOME": str(self.work / "home"),
            **more,
        }


@contextmanager
def process(arguments: list[str], log: Path, variables: dict[str, str]) -> Iterator[int]:
    """Run a command in a session of its own for the length of the block; yield its pid."""
    with log.open("ab") as output:
        child = subprocess.Popen(
            arguments, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=variables, start_new_session=True
        )
    try:
        yield child.pid
    finally:
        child.send_signal(signal.SIGTERM)
        try:
            child.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()


@contextmanager
def peak_memory(processes: Callable[[], Iterable[int]]) -> Iterator[Callable[[], float]]:
    """Sample the resident memory of some processes together; yield what returns the most so far, in MiB."""
    most = 0.0
    stop = threading.Event()

    def sample() -> None:
        nonlocal most
        while not stop.wait(0.1):
            most = max(most, sum(_resident(pid) for pid in processes()))

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield lambda: most
    finally:
        stop.set()
        thread.join()


def descendants(root: int) -> set[int]:
    """Return a process and all that it has started, directly or not."""
    parents: dict[int, int] = {}
    for path in Path("/proc").iterdir():
        if path.name.isdigit():
            stat = _read(path / "stat")
            if stat:
                parents[int(path.name)] = int(stat.rpartition(")")[2].split()[1])
    found = {root}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return found


def mentioning(text: str) -> set[int]:
    """Return the processes whose command line holds ``text``."""
    numbers = [path for path in Path("/proc").iterdir() if path.name.isdigit()]
    return {int(path.name) for path in numbers if text in _read(path / "cmdline").replace("\0", " ")}


def _resident(pid: int) -> float:
    for line in _read(Path(f"/proc/{pid}/status")).splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    return 0.0


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:  # it has just ended
        return ""


def round_ends(times: Path) -> list[float]:
    """Return what an app has noted."""
    return [float(line) for line in times.read_text().split()]
