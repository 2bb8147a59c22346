"""A federation of real daemons on this machine, for measuring: one server, so many sites, mTLS on loopback."""

import json
import os
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
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
    """Holds all that follows, and ``logs``."""
    state: Path
    """The server's state folder."""
    port: int
    pid: int
    """The server's."""
    daemons: Daemons = field(repr=False)

    def log(self, name: str) -> Path:
        """Return the log of a site, or of the ``server``."""
        return self.folder / "logs" / f"{name}.log"

    def start_site(
        self,
        name: str,
        data: Path,
        *options: str,
        models: Mapping[str, Path] = MappingProxyType({}),
        role: str = "site",
        policy: str = "",
        program: Sequence[str] = (),
    ) -> None:
        """Invite a member and start its daemon.

        Args:
            name: Of the member.
            data: Its rows.
            options: Of the daemon.
            models: What its policy allows: folders by the plan's name.
            role: site or evaluator.
            policy: More of its policy, TOML.
            program: What to start in place of ``fsllm-client``, with the same options.

        """
        join = self.folder / f"{name}.join"
        self.fsllm("site", "invite", name, "--role", role, "--host", "localhost", "-o", str(join))
        usual, *arguments = site_command(self.port, data, join, self.folder / name, models, policy)
        self.daemons.start(name, [*(program or (usual,)), *arguments, "--metrics-port", "0", *options])

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


def site_command(
    port: int, data: Path, join: Path, state: Path, models: Mapping[str, Path], more: str = ""
) -> list[str]:
    """Write the policy of a site of this host (``more``: its other tables), and return what starts its daemon."""
    state.mkdir(parents=True, mode=0o700)
    policy = state / "policy.toml"
    allowed = "".join(f"{name} = {json.dumps(str(path))}\n" for name, path in models.items())
    policy.write_text(f"[models]\n{allowed}{more}")
    return [
        command("fsllm-client"),
        *("--server", f"localhost:{port}", "--data", str(data), "--join", str(join)),
        *("--state-dir", str(state), "--policy", str(policy)),
    ]


def start_server(daemons: Daemons, state: Path, *options: str) -> tuple[int, int]:
    """Start a server on free ports and return its pid and its port, once it serves.

    Raises:
        Unavailable: It did not start.

    """
    arguments = ["--port", "0", "--metrics-port", "0", "--state-dir", str(state), *options]
    pid = daemons.start("server", [command("fsllm-server"), *arguments], await_ready=True)
    return pid, json.loads((state / "server.json").read_text())["port"]


@contextmanager
def served(folder: Path, *server_options: str) -> Iterator[Federation]:
    """Start a server whose state lies in ``folder``; end it, and the sites that were started, with the block."""
    with Daemons(folder / "logs", daemon_environment()) as daemons:
        pid, port = start_server(daemons, folder / "server", *server_options)
        yield Federation(folder, folder / "server", port, pid, daemons)


@contextmanager
def federation(sites: int, *server_options: str) -> Iterator[Federation]:
    """Start a server and so many sites without data; end and remove them with the block."""
    with tempfile.TemporaryDirectory(prefix="fsllm-bench-") as name, served(Path(name), *server_options) as here:
        data = here.folder / "data"
        data.mkdir()
        for number in range(sites):
            here.start_site(f"site-{number}", data)
        yield here
