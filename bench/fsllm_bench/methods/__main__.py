"""``python -m fsllm_bench.methods``: every method on the embedded federation, and the robust ones under attack."""

from __future__ import annotations

import itertools
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Final

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from fsllm_bench.methods import plans, runs, tables
from fsllm_bench.methods.attacks import ATTACKS
from fsllm_bench.methods.splits import SPLITS
from fsllm_bench.report import write_section
from fsllm_common.errors import FsllmError

SECTION: Final = "methods"


class Names(click.ParamType[tuple[str, ...]]):
    """Comma-separated names out of a known set."""

    name = "names"

    def __init__(self, known: tuple[str, ...]) -> None:
        self._known = known

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        """Return the names."""
        names = tuple(name for name in str(value).split(",") if name)
        if unknown := [name for name in names if name not in self._known]:
            self.fail(f"{unknown[0]!r} is none of {', '.join(self._known)}", param, ctx)
        return names


def _numbers(context: click.Context, option: click.Parameter, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(number) for number in text.split(","))
    except ValueError:
        raise click.BadParameter("seeds are whole numbers, e.g. 0,1,2") from None


@click.command()
@click.option("--methods", type=Names(tuple(plans.METHODS)), default=",".join(plans.METHODS), help="Which. [all]")
@click.option("--seeds", default="0,1,2", show_default=True, callback=_numbers, help="Of the rows and of the training.")
@click.option("--splits", type=Names(SPLITS), default=",".join(SPLITS), show_default=True)
@click.option("--attacks", type=Names(tuple(ATTACKS)), default=",".join(ATTACKS), show_default=True)
@click.option("--minutes", type=float, help="Begin no run after so many; 0: only make the tables. [until all are done]")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("build/methods"),
    show_default=True,
    help="Where results.jsonl and logs are kept; what is in it is not measured again.",
)
@click.option(
    "--lock", type=click.Path(path_type=Path), help="A file to lock during every few runs, where others measure."
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line, as soon as it is known.")
@click.option("--write", type=click.Path(path_type=Path, exists=True), help="The page whose section gets the tables.")
def main(
    methods: tuple[str, ...],
    seeds: tuple[int, ...],
    splits: tuple[str, ...],
    attacks: tuple[str, ...],
    minutes: float | None,
    out: Path,
    lock: Path | None,
    write: Path | None,
    *,
    as_json: bool,
) -> None:
    """Measure each method on each split and seed, and the robust ones with a lying site. Goes on where it stopped."""
    console = Console(stderr=True)
    results = runs.Results(out / "results.jsonl")
    cells = plans.cells(methods, seeds, splits, attacks)
    todo = results.missing(cells)
    until = None if minutes is None else time.monotonic() + 60 * minutes
    bars = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console
    )
    try:
        with bars:
            task = bars.add_task("", total=len(cells), completed=len(cells) - len(todo))
            for (split, seed), group in itertools.groupby(todo, key=lambda cell: (cell.split, cell.seed)):
                if until is not None and time.monotonic() >= until:
                    break
                bars.update(task, description=f"{split}, seed {seed}: starting")
                with runs.members(out / f"{split}-{seed}", split, seed) as here:
                    for cell in runs.by_turns(group, lock):
                        if until is not None and time.monotonic() >= until:
                            break
                        bars.update(task, description=cell.name)
                        measured = runs.measure(here, cell)
                        results.add(measured)
                        if measured.failure:
                            console.print(f"{cell.name}: {measured.failure}", style="red", markup=False)
                        if as_json:
                            click.echo(json.dumps(asdict(measured)))
                        bars.advance(task)
    except FsllmError as error:
        console.print(f"error: {error}", style="red", markup=False)
        raise SystemExit(error.exit_code) from None
    if write is not None:
        write_section(write, SECTION, ["make methods"], tables.page(results.found, seeds, splits, methods))


if __name__ == "__main__":
    main()
