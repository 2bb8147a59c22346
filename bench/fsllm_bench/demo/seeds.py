"""The demo over several seeds, as docs/measurements.md shows it: ``python -m fsllm_bench.demo.seeds --out FOLDER``."""

import json
import statistics
import subprocess
from pathlib import Path

import click

from fsllm_bench.daemons import command


def table(runs: list[list[dict[str, float | str]]]) -> str:
    """Return a Markdown table from each seed's results: mean loss, mean exact match, and exact match seed by seed."""
    lines = ["| trained on | loss, mean | exact match, mean | by seed |", "|---|---|---|---|"]
    for position, first in enumerate(runs[0]):
        losses = [float(run[position]["loss"]) for run in runs]
        matches = [100 * float(run[position]["exact_match"]) for run in runs]
        lines.append(
            f"| {first['name']} | {statistics.mean(losses):.3f} | {statistics.mean(matches):.1f} % | "
            f"{', '.join(f'{match:.1f}' for match in matches)} |"
        )
    return "\n".join(lines)


@click.command()
@click.option("--seeds", default=5, show_default=True, help="Seeds 0 to this, less one.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("demo-out"), show_default=True)
def main(seeds: int, out: Path) -> None:
    """Run the demo once a seed, and print the table."""
    runs = []
    for seed in range(seeds):
        folder = out / f"seed-{seed}"
        subprocess.run([command("fsllm"), "demo", "--seed", str(seed), "--out", str(folder)], check=True)
        runs.append(json.loads((folder / "results.json").read_text())["results"])
    click.echo(table(runs))


if __name__ == "__main__":
    main()
