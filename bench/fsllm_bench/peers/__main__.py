"""Compare: ``python -m fsllm_bench.peers``."""

import itertools
import json
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from fsllm_bench.peers import flare, flower
from fsllm_bench.peers.environment import Outcome
from fsllm_bench.report import markdown, write_section
from fsllm_bench.rounds import measure_rounds, parse_cell

CELLS: Final = tuple(f"{size}x{sites}" for size in (8, 64, 256) for sites in (2, 4, 8))
ROUNDS: Final = 6
PEERS_TARGET: Final = "make bench-peers"
PEERS: Final = {f"NVIDIA FLARE {flare.VERSION}": flare.measure, f"Flower {flower.VERSION}": flower.measure}
COLUMNS: Final = ("MiB of float32", "sites", "who", "s a round", "times ours", "servers' peak, MiB")


@dataclass(frozen=True, slots=True)
class Compared:
    """One system in one cell."""

    mebibytes: float
    sites: int
    who: str
    seconds: float
    times_ours: float
    peak_mebibytes: float

    def row(self) -> list[str]:
        """Return a line of the table."""
        return [
            f"{self.mebibytes:g}",
            str(self.sites),
            self.who,
            f"{self.seconds:.2f}",
            f"{self.times_ours:.1f}",
            f"{self.peak_mebibytes:.0f}",
        ]


def _seconds(outcome: Outcome) -> float:
    return statistics.median(after - before for before, after in itertools.pairwise(outcome.ends))


@click.command()
@click.option(
    "--cell",
    "cells",
    multiple=True,
    default=CELLS,
    show_default=True,
    callback=parse_cell,
    help="MIBxSITES; all nine take an hour or two on two cores.",
)
@click.option("--rounds", default=ROUNDS, show_default=True, help="Rounds a peer; the first is not counted.")
@click.option("--folder", default=".bench-peers", show_default=True, type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line, as soon as it is known.")
@click.option("--write", default=None, type=click.Path(path_type=Path, exists=True), help="The page to write.")
def main(cells: list[tuple[float, int]], rounds: int, folder: Path, *, as_json: bool, write: Path | None) -> None:
    """Measure rounds without training on NVIDIA FLARE and Flower, each right after our own.

    The peers are installed in FOLDER, which also holds what they write: 1 GB and their models. FLARE takes ports 8002
    and 8003.
    """
    console = Console(stderr=as_json)
    table = Table(*COLUMNS, title="Rounds without training: the peers")
    bars = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console
    )
    rows: list[Compared] = []
    with bars:
        task = bars.add_task("", total=len(cells) * len(PEERS))
        for mebibytes, sites in cells:
            for who, measure in PEERS.items():
                bars.update(task, description=f"{mebibytes:g} MiB x {sites}: ours, then {who}")
                seconds, _, peak = measure_rounds(mebibytes, sites, max(rounds, 5))
                theirs = measure(folder, mebibytes, sites, rounds)
                pair = [
                    Compared(mebibytes, sites, "fsllm", seconds, 1.0, peak),
                    Compared(
                        mebibytes, sites, who, _seconds(theirs), _seconds(theirs) / seconds, theirs.peak_mebibytes
                    ),
                ]
                for row in pair:
                    rows.append(row)
                    table.add_row(*row.row())
                    if as_json:
                        click.echo(json.dumps(asdict(row)))
                bars.advance(task)
    if not as_json:
        console.print(table)
    if write is not None:
        asked = "" if len(cells) == len(CELLS) else "".join(f" --cell {size:g}x{sites}" for size, sites in cells)
        command = f"python -m fsllm_bench.peers{asked} --rounds {rounds}" if asked or rounds != ROUNDS else PEERS_TARGET
        write_section(write, "peers", [command], markdown(COLUMNS, [row.row() for row in rows]))


if __name__ == "__main__":
    main()
