"""A federation of real daemons on this machine, for measuring: one server, so many sites, mTLS on loopback."""

import json
import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fsllm_bench.daemons import Daemons, command, daemon_environment
from fsllm_operator.connection import Connection
from fsllm_operator.credentials import connect, discover

TENSORS = 64


@dataclass(frozen=True, slots=True)
class Federation:
    """What is running, and where."""

    folder: Path
    """Removed at the end."""
    state: Path
    """The server's state folder."""
    port: int
    pid: int
    """The server's."""

    def fsllm(self, *arguments: str) -> str:
        """Run the operator's command and return what it printed."""
        done = subprocess.run(
            [command("fsllm"), *arguments],
            env=daemon_environment()
            | {"FSLLM_STATE_DIR": str(self.state), "HOME": str(self.folder), "LANG": os.environ.get("LANG", "C.UTF-8")},
            check=False,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise SystemExit(f"fsllm {' '.join(arguments)}: {done.stderr}")
        return done.stdout

    def run_rounds(self, name: str, rounds: int, sites: int, mebibytes: float) -> dict[str, Any]:
        """Let the sites do so many rounds without training, and return the run as `fsllm run show --json` has it."""
        self.fsllm("run", "submit", str(self.write_plan(name, rounds, sites, mebibytes)), "--watch")
        run: dict[str, Any] = json.loads(self.fsllm("run", "show", name, "--json"))
        return run

    def write_plan(self, name: str, rounds: int, sites: int, mebibytes: float) -> Path:
        """Write the plan of a run without training that needs all ``sites``, and return its file."""
        plan = {
            "name": name,
            "rounds": rounds,
            "model": {"name": "synthetic"},
            "algorithm": {"name": "noop", "synthetic": {"tensors": TENSORS, "mebibytes": mebibytes}},
            "cohort": {"quorum": sites},
            "wire": {"element_type": "fp32"},
            "evaluate": {"every": 0, "metrics": []},
        }
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(plan))
        return path

    @contextmanager
    def connection(self) -> Iterator[Connection]:
        """Connect as the operator of this host."""
        with connect(discover(f"localhost:{self.port}", self.state / "operator")) as connection:
            yield connection

    def server_peak(self) -> float:
        """Return the server's peak resident memory in MiB."""
        return memory(self.pid, "VmHWM")


def memory(pid: int, field: str) -> float:
    """Return a line of ``/proc/<pid>/status``, e.g. VmHWM or VmRSS, in MiB."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{field}:"))


def cpu_seconds(pid: int) -> float:
    """Return the processor time that a process has used so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def federation(sites: int, *server_options: str) -> Iterator[Federation]:
    """Start a server and so many sites; end and remove them with the block."""
    with tempfile.TemporaryDirectory(prefix="fsllm-bench-") as name:
        folder = Path(name)
        state = folder / "server"
        with Daemons(folder / "logs", daemon_environment()) as daemons:
            options = ["--port", "0", "--metrics-port", "0", "--state-dir", str(state), *server_options]
            pid = daemons.start("server", [command("fsllm-server"), *options], await_ready=True)
            port: int = json.loads((state / "server.json").read_text())["port"]
            here = Federation(folder, state, port, pid)
            data = folder / "data"
            data.mkdir()
            for number in range(sites):
                join = folder / f"site-{number}.join"
                here.fsllm("site", "invite", f"site-{number}", "--host", "localhost", "-o", str(join))
                daemons.start(
                    f"site-{number}",
                    [
                        command("fsllm-client"),
                        *("--server", f"localhost:{port}", "--data", str(data), "--join", str(join)),
                        *("--state-dir", str(folder / f"site-{number}"), "--metrics-port", "0"),
                    ],
                )
            yield here
