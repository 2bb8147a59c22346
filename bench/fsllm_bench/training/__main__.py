"""``python -m fsllm_bench.training``: the client's training beside the plain Hugging Face Trainer's."""

from __future__ import annotations

import json
import os
import shlex
import sys
import tempfile
from pathlib import Path

import click
from rich.console import Console

from fsllm_bench.embedded import model_path
from fsllm_bench.training import overhead, report, throughput
from fsllm_bench.training import setting as settings
from fsllm_common.errors import FsllmError


@click.command()
@click.option("--model", type=click.Path(path_type=Path, exists=True), help="A model folder; SmolLM2 where installed.")
@click.option("--data", type=click.Path(path_type=Path, exists=True), help="Rows of your own, jsonl; else made ones.")
@click.option("--fields", default="", help="How the file's fields are named, e.g. instruction=question,output=answer.")
@click.option("--examples", type=int, help="Rows of a pass, about; 200 with the embedded model, else 64.")
@click.option("--batch", type=int, help="Examples a step, about; 16 with the embedded model, else 8.")
@click.option("--repetitions", default=3, show_default=True, help="Passes that count, after one that does not.")
@click.option("--rounds", default=6, show_default=True, help="Of the federation that measures overheads; 0: none.")
@click.option("--seed", default=0, show_default=True, help="Of the rows, the adapter and the order of the batches.")
@click.option("--precision", type=click.Choice(["bf16", "fp32"]), default="fp32", show_default=True)
@click.option("--threads", default=os.cpu_count() or 1, show_default=True, help="Of either trainer.")
@click.option("--out", type=click.Path(path_type=Path), help="Keep logs and adapters in this folder.")
@click.option(
    "--write", "docs", type=click.Path(path_type=Path), help="Write the section into this file, between its markers."
)
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
def main(
    model: Path | None,
    data: Path | None,
    fields: str,
    examples: int | None,
    batch: int | None,
    repetitions: int,
    rounds: int,
    seed: int,
    precision: str,
    threads: int,
    out: Path | None,
    docs: Path | None,
    *,
    as_json: bool,
) -> None:
    """Measure answer tokens a second beside the plain Trainer's, and what a round costs besides training."""
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory(prefix="fsllm-training-") as scratch:
        folder = out or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            model = model or settings.default_model()
            small = model.resolve() == model_path()
            setting = settings.make(
                model,
                data,
                folder,
                examples=examples or (200 if small else 64),
                batch=batch or (16 if small else 8),
                passes=1 + repetitions,
                seed=seed,
                precision=precision,
                fields=dict(_pair(pair) for pair in fields.split(",") if pair),
            )
            waits = overhead.measure(setting, rounds) if rounds else None
            compared = throughput.compare(setting, threads=threads, tell=lambda line: console.print(line, style="dim"))
            if docs is not None:
                report.write_section(
                    docs, setting, compared, waits, shlex.join(["python", "-m", "fsllm_bench.training", *sys.argv[1:]])
                )
        except FsllmError as error:
            console.print(f"[red]error:[/red] {error}", style=None)
            raise SystemExit(error.exit_code) from None
    if as_json:
        click.echo(json.dumps(report.as_json(setting, compared, waits)))
    else:
        report.show(Console(), setting, compared, waits)


def _pair(pair: str) -> tuple[str, str]:
    ours, equals, theirs = pair.partition("=")
    if not equals:
        raise click.BadParameter(f"{pair!r} is not NAME=FIELD", param_hint="--fields")
    return ours, theirs


if __name__ == "__main__":
    main()
