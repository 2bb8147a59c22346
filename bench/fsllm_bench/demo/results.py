"""What the demo found: a table, a plot in the terminal, and a PNG."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

_BAR = 40


@dataclass(frozen=True)
class Result:
    """One way of training, measured on the common held-out file."""

    name: str
    loss: float
    exact_match: float
    """Share of the held-out answers that are right, 0 to 1."""


def held_out(run: Mapping[str, Any], evaluator: str) -> list[tuple[int, float, float]]:
    """Return (round, loss, exact match) of each evaluated round, from ``fsllm run show --json``."""
    found = []
    for commit in run["commits"]:
        for member in commit.get("metrics", []):
            if member["member"] == evaluator:
                values = {metric["name"]: metric.get("value", 0.0) for metric in member["metrics"]}
                found.append((int(commit.get("round", 0)), values["loss"], values.get("exact_match", 0.0)))
    return found


def show(console: Console, results: Sequence[Result], rounds: Sequence[tuple[int, float, float]]) -> None:
    """Print the table, a bar for each way, and the federation's loss round by round."""
    table = Table(title="On the common held-out set", title_justify="left")
    table.add_column("trained on")
    table.add_column("loss", justify="right")
    table.add_column("exact match", justify="right")
    table.add_column("")
    best = max(result.exact_match for result in results) or 1.0
    for result in results:
        style = "bold green" if result.name == "federation" else ""
        bar = "█" * round(_BAR * result.exact_match / best)
        table.add_row(
            Text(result.name, style=style),
            f"{result.loss:.3f}",
            f"{result.exact_match:.1%}",
            Text(bar, style=style or "dim"),
        )
    console.print(table)
    if len(rounds) > 1:
        console.print("Held-out loss of the federation, round by round:")
        highest = max(loss for _, loss, _ in rounds)
        for number, loss, match in rounds:
            console.print(f"  {number:3d}  {loss:6.3f}  {match:6.1%}  [dim]{'▇' * round(_BAR * loss / highest)}[/dim]")


def write(folder: Path, results: Sequence[Result], rounds: Sequence[tuple[int, float, float]]) -> Path:
    """Write results.json and results.png into ``folder`` and return the PNG's path."""
    (folder / "results.json").write_text(
        json.dumps({"results": [asdict(result) for result in results], "rounds": list(rounds)}, indent=2) + "\n"
    )
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    colours = ["#2a9d5c" if result.name == "federation" else "#9aa5b1" for result in results]
    bars = left.barh(
        [result.name for result in results], [100 * result.exact_match for result in results], color=colours
    )
    left.bar_label(bars, fmt="%.0f %%", padding=3)
    left.invert_yaxis()
    left.set_xlabel("exact match on the held-out set, %")
    left.set_xlim(0, 108)
    numbers = [number for number, _, _ in rounds]
    right.plot(numbers, [loss for _, loss, _ in rounds], marker="o", color="#2a9d5c", label="federation")
    for result in results:
        if result.name != "federation":
            right.axhline(result.loss, color="#9aa5b1", linewidth=1)
            right.annotate(
                result.name, (numbers[-1], result.loss), ha="right", va="bottom", fontsize=8, color="#52606d"
            )
    right.set_xlabel("round")
    right.set_ylabel("loss on the held-out set")
    right.set_ylim(bottom=0)
    right.legend()
    path = folder / "results.png"
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return path
