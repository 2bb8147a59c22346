"""Seconds a round and memory of the server, without training: ``python -m fsllm_bench.rounds``.

Real daemons over mTLS on loopback; every site sends a made-up float32 delta (``algorithm.name: noop``), which the
server spools, syncs, verifies, folds and publishes as any other. A round is the time between two commits, so it holds
every upload, the fold, and every download. Beside it the floor: the same bytes through bare gRPC (see ``floor``).
"""

import itertools
import json
import statistics
import sys
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from fsllm_bench.federation import cpu_seconds, federation
from fsllm_bench.floor import floor
from fsllm_bench.report import markdown, write_section
from fsllm_server.settings import ServerSettings

CELLS = (*(f"{size}x{sites}" for size in (8, 64, 256) for sites in (2, 4, 8)), "8x32", "64x32")
WARM = 5
"""Rounds in front that are not counted: until as many old versions and uploads are let go of as new ones come."""

COLUMNS = (
    "MiB of float32",
    "sites",
    "s a round",
    "floor, s",
    "ratio",
    "server CPU, s",
    "server's peak, MiB",
    "allowed",
)


@dataclass(frozen=True, slots=True)
class Measured:
    """One cell."""

    mebibytes: float
    sites: int
    seconds: float
    """The median of the rounds."""
    floor_seconds: float
    server_cpu_seconds: float
    """A round, over the whole run."""
    peak_mebibytes: float
    """Resident memory of the server, at most."""
    allowed_mebibytes: float
    """120 MiB, 1.2 times the payload, and 32 MiB for each upload that proceeds at a time."""

    @property
    def ratio(self) -> float:
        """How many times longer a round takes than the floor."""
        return self.seconds / self.floor_seconds

    def row(self) -> list[str]:
        """Return the cell as a line of the table."""
        return [
            f"{self.mebibytes:g}",
            str(self.sites),
            f"{self.seconds:.2f}",
            f"{self.floor_seconds:.2f}",
            f"{self.ratio:.2f}",
            f"{self.server_cpu_seconds:.2f}",
            f"{self.peak_mebibytes:.0f}",
            f"{self.allowed_mebibytes:.0f}",
        ]


def measure(mebibytes: float, sites: int, rounds: int) -> Measured:
    """Measure a cell in a fresh federation, then its floor."""
    seconds, cpu, peak = measure_rounds(mebibytes, sites, rounds)
    streams = min(sites, ServerSettings.model_fields["uploads_at_once"].default)
    allowed = 120 + 1.2 * mebibytes + 32 * streams
    return Measured(mebibytes, sites, seconds, floor(sites, mebibytes, rounds), cpu, peak, allowed)


def measure_rounds(mebibytes: float, sites: int, rounds: int) -> tuple[float, float, float]:
    """Return the median seconds of a round, the server's processor seconds a round, and its peak memory in MiB."""
    with federation(sites) as here:
        before = cpu_seconds(here.pid)
        run = here.run_rounds("rounds", WARM + rounds, sites, mebibytes)
        cpu = (cpu_seconds(here.pid) - before) / (WARM + rounds)
        return statistics.median(round_seconds(run)[WARM:]), cpu, here.server_peak()


def round_seconds(run: dict[str, Any]) -> list[float]:
    """Return the time between commits, from version 0 on."""
    at = [datetime.fromisoformat(commit["at"]) for commit in run["commits"]]
    return [(after - before).total_seconds() for before, after in itertools.pairwise(at)]


def parse_cell(context: click.Context, option: click.Parameter, texts: tuple[str, ...]) -> list[tuple[float, int]]:
    """Return (MiB, sites) of each ``MIBxSITES``."""
    try:
        return [(float(size), int(sites)) for size, sites in (text.split("x") for text in texts)]
    except ValueError as error:
        raise click.BadParameter("a cell is MIBxSITES, e.g. 64x8") from error


@click.command()
@click.option(
    "--cell", "cells", multiple=True, default=CELLS, callback=parse_cell, help="MIBxSITES; several times. [all]"
)
@click.option("--rounds", default=5, show_default=True, help=f"Rounds a cell that count; {WARM} more go before.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line, as soon as it is known.")
@click.option(
    "--write", type=click.Path(path_type=Path, exists=True), help="The page whose section gets the table.", default=None
)
def main(cells: list[tuple[float, int]], rounds: int, *, as_json: bool, write: Path | None) -> None:
    """Measure rounds without training: seconds, their floor, and the server's memory.

    State lies in the folder for temporary files (TMPDIR): it should be on a real disk, with 20 GB free for all cells.
    """
    console = Console(stderr=as_json)
    bars = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console
    )
    table = Table(*COLUMNS, title="Rounds without training")
    done: list[Measured] = []
    with bars:
        task = bars.add_task("", total=len(cells))
        for mebibytes, sites in cells:
            bars.update(task, description=f"{mebibytes:g} MiB x {sites} sites")
            cell = measure(mebibytes, sites, rounds)
            done.append(cell)
            table.add_row(*cell.row())
            if as_json:
                click.echo(json.dumps(asdict(cell) | {"ratio": cell.ratio}))
            bars.advance(task)
    if not as_json:
        console.print(table)
    if write is not None:
        write_section(write, "rounds", ["make bench"], markdown(COLUMNS, [cell.row() for cell in done]))
    if over := [cell for cell in done if cell.peak_mebibytes > cell.allowed_mebibytes]:
        sys.exit(f"The server took more memory than allowed in {len(over)} cells")


if __name__ == "__main__":
    main()
