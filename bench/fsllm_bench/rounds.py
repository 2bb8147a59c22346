"""Seconds a round and memory of the server, without training: ``python -m fsllm_bench.rounds``.

Real daemons over mTLS on loopback; every site sends a made-up float32 delta (``algorithm.name: noop``), which the
server spools, syncs, verifies, folds and publishes as any other. A round is the time between two commits, so it holds
every upload, the fold, and every download.
"""

import itertools
import json
import statistics
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import click
import yaml
from rich.console import Console
from rich.table import Table

from fsllm_bench.daemons import Daemons, command, daemon_environment

SIZES = (8, 64, 256)
SITES = (2, 4, 8)


@contextmanager
def federation(sites: int) -> Iterator[tuple[Path, int]]:
    """Start a server and so many sites; yield the server's state folder and its pid."""
    with tempfile.TemporaryDirectory(prefix="fsllm-rounds-") as name:
        folder = Path(name)
        state = folder / "server"
        with Daemons(folder / "logs", daemon_environment()) as daemons:
            pid = daemons.start(
                "server",
                [command("fsllm-server"), "--port", "0", "--metrics-port", "0", "--state-dir", str(state)],
                await_ready=True,
            )
            port = json.loads((state / "server.json").read_text())["port"]
            data = folder / "data"
            data.mkdir()
            for number in range(sites):
                join = folder / f"site-{number}.join"
                _fsllm(state, "site", "invite", f"site-{number}", "--host", "localhost", "-o", str(join))
                daemons.start(
                    f"site-{number}",
                    [
                        command("fsllm-client"),
                        *("--server", f"localhost:{port}", "--data", str(data), "--join", str(join)),
                        *("--state-dir", str(folder / f"site-{number}"), "--metrics-port", "0"),
                    ],
                )
            yield state, pid


def measure(sites: int, mebibytes: float, rounds: int) -> tuple[float, float]:
    """Return (median seconds a round, the server's peak resident MiB) of a fresh federation."""
    with federation(sites) as (state, pid):
        plan = {
            "name": "rounds",
            "rounds": rounds,
            "model": {"name": "synthetic"},
            "algorithm": {"name": "noop", "synthetic": {"tensors": 64, "mebibytes": mebibytes}},
            "cohort": {"quorum": sites},
            "wire": {"element_type": "fp32"},
            "evaluate": {"every": 0, "metrics": []},
        }
        path = state.parent / "plan.yaml"
        path.write_text(yaml.safe_dump(plan))
        _fsllm(state, "run", "submit", str(path), "--watch")
        run: dict[str, Any] = json.loads(_fsllm(state, "run", "show", "rounds", "--json"))
        at = [datetime.fromisoformat(commit["at"]) for commit in run["commits"]]
        peak = next(
            int(line.split()[1]) / 1024
            for line in Path(f"/proc/{pid}/status").read_text().splitlines()
            if line.startswith("VmHWM")
        )
    seconds = [(after - before).total_seconds() for before, after in itertools.pairwise(at)]
    return statistics.median(seconds[1:] or seconds), peak


def _fsllm(state: Path, *arguments: str) -> str:
    done = subprocess.run(
        [command("fsllm"), *arguments],
        env=daemon_environment() | {"FSLLM_STATE_DIR": str(state), "HOME": str(state.parent)},
        check=False,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"fsllm {' '.join(arguments)}: {done.stderr}")
    return done.stdout


@click.command()
@click.option("--rounds", default=6, show_default=True, help="Rounds a cell; the first is not counted.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
def main(rounds: int, *, as_json: bool) -> None:
    """Measure every size with every number of sites."""
    console = Console()
    table = Table("MiB of float32", "sites", "s a round", "server's peak MiB", title="Rounds without training")
    for mebibytes in SIZES:
        for sites in SITES:
            seconds, peak = measure(sites, mebibytes, rounds)
            if as_json:
                click.echo(json.dumps({"mib": mebibytes, "sites": sites, "seconds": seconds, "peak_mib": peak}))
            else:
                console.print(f"[dim]{mebibytes} MiB x {sites}: {seconds:.2f} s, {peak:.0f} MiB[/dim]")
            table.add_row(str(mebibytes), str(sites), f"{seconds:.2f}", f"{peak:.0f}")
    if not as_json:
        console.print(table)


if __name__ == "__main__":
    main()
