"""The command ``fsllm demo``: it runs the very commands that anyone would type, and shows them."""

import json
import os
import shlex
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from fsllm_bench.daemons import Daemons, command, daemon_environment
from fsllm_bench.demo import data, plans, results
from fsllm_bench.embedded import model_path
from fsllm_bench.federation import site_command, start_server
from fsllm_common.errors import Exit, FsllmError, InputError, ModelUnusable, Unavailable

_EPILOG = """\b
Examples:
  fsllm demo                                                      the embedded model and tasks
  fsllm demo --seed 3 --out demo-3                                another deal of the data
  fsllm demo --model smollm2 --data train.jsonl --fields instruction=question,output=answer
  fsllm demo --model ./my-llama --data rows.jsonl --split-by category
"""

_POOLED = "all data in one place"

_NEXT = """
Next, across real hosts:
  fsllm-server --port 50051                                                    # the operator's host
  fsllm site invite hospital-a -o hospital-a.join                              # hand the file to the site
  fsllm-client --server HOST:50051 --data ./private --join hospital-a.join     # at the site
  fsllm run submit {plan} --watch                      # or a plan of your own"""


@click.command(epilog=_EPILOG)
@click.option("--model", default="embedded", show_default=True, help="embedded, smollm2, or the folder of a model.")
@click.option(
    "--data",
    "source",
    type=click.Path(path_type=Path),
    help="A jsonl file to divide among the sites; needed unless the model is the embedded one.",
)
@click.option("--split-by", help="Rows with the same value of this field stay at one site.")
@click.option("--fields", default="", help="How the file's fields are named, e.g. instruction=question,output=answer.")
@click.option("--normalizer", help="How answers are compared: strip, lower, number, gsm8k.")
@click.option("--seed", default=0, show_default=True, help="Deals the data, begins the adapter, orders the batches.")
@click.option("--rounds", type=int, help="Rounds of the federation.")
@click.option("--steps", type=int, help="Training steps a round and site.")
@click.option("--compare/--no-compare", default=True, help="Also train each site alone, and all data in one place.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("demo-out"), show_default=True)
def demo(
    model: str,
    source: Path | None,
    split_by: str | None,
    fields: str,
    normalizer: str | None,
    seed: int,
    rounds: int | None,
    steps: int | None,
    *,
    compare: bool,
    out: Path,
) -> None:
    """Run a real federation of three sites on this machine, and show what it gained.

    One server, three sites, an evaluator that alone holds the held-out file, and (for comparison) a site that holds
    all rows: separate processes, mTLS between them. At most three minutes on two cores with the embedded model.
    """
    console = Console(highlight=False)
    started = time.monotonic()
    try:
        folder, name = _model(model)
        files = _files(model, source, out, seed, split_by)
        mapping = dict(_pair(pair) for pair in fields.split(",") if pair)
        written = plans.write(
            out / "plans", name, seed, rounds=rounds, steps=steps, fields=mapping, normalizer=normalizer
        )
        _run(console, out, name, folder, files, written, compare=compare)
    except FsllmError as error:
        console.print(f"[red]error:[/red] {error}", style=None)
        raise SystemExit(error.exit_code) from None
    console.print(f"[dim]{time.monotonic() - started:.0f} s in all.[/dim]")


def _model(model: str) -> tuple[Path, str]:
    if model == "embedded":
        return model_path(), "embedded"
    folder = Path(os.environ.get("VIRTUAL_ENV", ".venv")) / "models" / "smollm2" if model == "smollm2" else Path(model)
    if not (folder / "config.json").is_file():
        cure = "Run `make smollm2` first." if model == "smollm2" else None
        raise ModelUnusable("MODEL_MISSING", f"--model {model}: there is no model in {folder}", cure=cure)
    return folder.resolve(), "smollm2" if model == "smollm2" else "model"


def _files(model: str, source: Path | None, out: Path, seed: int, split_by: str | None) -> data.Files:
    shutil.rmtree(out, ignore_errors=True)
    folder = (out / "data").resolve()
    if source is not None:
        return data.divide(source, folder, seed, split_by)
    if model != "embedded":
        raise InputError("DATA_INVALID", f"--model {model} needs --data FILE", cure="Name a jsonl file of your own.")
    return data.embedded(folder, seed)


def _pair(pair: str) -> tuple[str, str]:
    ours, equals, theirs = pair.partition("=")
    if not equals:
        raise InputError("SETTING_INVALID", f"--fields: {pair!r} is not NAME=FIELD")
    return ours, theirs


class _Operator:
    """The command ``fsllm`` with the operator's credential of the demo's server."""

    def __init__(self, console: Console, state: Path) -> None:
        self._console = console
        self._base = [command("fsllm")]
        self._environment = os.environ | {"FSLLM_STATE_DIR": str(state)}

    def __call__(self, *arguments: str, shown: bool = True) -> str:
        if shown:
            self._console.print(f"[bold]$ fsllm {shlex.join(arguments)}[/bold]", soft_wrap=True)
        done = subprocess.run(
            [*self._base, *arguments], env=self._environment, check=False, capture_output=True, text=True
        )
        if done.returncode:
            raise Unavailable("RUN_FAILED", done.stderr.strip() or f"fsllm {arguments[0]} ended with {done.returncode}")
        return done.stdout

    def watch(self, *arguments: str) -> None:
        """Run a command whose live progress the person shall see."""
        self._console.print(f"[bold]$ fsllm {shlex.join(arguments)}[/bold]", soft_wrap=True)
        done = subprocess.run([*self._base, *arguments], env=self._environment, check=False)
        if done.returncode:
            raise Unavailable("RUN_FAILED", f"fsllm {arguments[0]} {arguments[1]} ended with {done.returncode}")

    def run(self, name: str) -> dict[str, Any]:
        """Return a run as ``fsllm run show --json`` tells it."""
        shown: dict[str, Any] = json.loads(self("run", "show", name, "--json", shown=False))
        return shown


def _run(
    console: Console,
    out: Path,
    model: str,
    folder: Path,
    files: data.Files,
    written: plans.Plans,
    *,
    compare: bool,
) -> None:
    members = {**files.sites, plans.EVALUATOR: files.held_out}
    if compare:
        members[data.POOLED] = files.pooled
    with (
        tempfile.TemporaryDirectory(prefix="fsllm-demo-") as secrets,
        Daemons(out / "logs", daemon_environment()) as daemons,
    ):
        state = (out / "server").resolve()
        console.print(f"[bold]$ fsllm-server --port 0 --state-dir {out / 'server'}[/bold]")
        _, port = start_server(daemons, state)
        operator = _Operator(console, state)
        for name, path in members.items():
            join = Path(secrets) / f"{name}.join"
            role = "evaluator" if name == plans.EVALUATOR else "site"
            operator("site", "invite", name, "--role", role, "--host", "localhost", "-o", str(join), shown=False)
            _start_site(console, daemons, out, name, path, join, port, {model: folder})
        operator.watch("run", "submit", str(written.federation), "--watch")
        daemons.check()
        operator("run", "export", "federation", "-o", str(out / "adapter"))
        federation = operator.run("federation")
        alone = {f"{site} alone": path for site, path in written.alone.items()}
        others = {_POOLED: written.pooled, **alone} if compare else {}
        if others:
            console.print(
                "\nFor comparison, each site alone (as many steps as it took in the federation) and all data in "
                "one place (as many as the sites took together):",
                soft_wrap=True,
            )
        for path in others.values():
            operator("run", "submit", str(path))
        for path in others.values():
            operator.watch("run", "watch", path.stem)
        measured = {label: results.held_out(operator.run(path.stem), plans.EVALUATOR) for label, path in others.items()}
    _report(console, out, results.held_out(federation, plans.EVALUATOR), measured)


def _start_site(
    console: Console,
    daemons: Daemons,
    out: Path,
    name: str,
    path: Path,
    join: Path,
    port: int,
    models: dict[str, Path],
) -> None:
    # The sites train side by side; the evaluator measures while most of them wait for it.
    cores = os.cpu_count() or 1
    threads = cores if name == plans.EVALUATOR else max(1, cores // len(data.SITES))
    arguments = site_command(port, path, join, (out / "sites" / name).resolve(), models)
    console.print(
        f"[bold]$ fsllm-client --server localhost:{port} --data {path.name} --join {name}.join[/bold]", soft_wrap=True
    )
    daemons.start(name, [*arguments, "--trainer-threads", str(threads)])


def _report(
    console: Console,
    out: Path,
    rounds: list[tuple[int, float, float]],
    measured: dict[str, list[tuple[int, float, float]]],
) -> None:
    if not rounds:
        raise SystemExit(Exit.RUN_FAILED)
    table = [results.Result("base model", *rounds[0][1:])]
    table += [
        results.Result(label, *series[-1][1:]) for label, series in measured.items() if series and label != _POOLED
    ]
    table.append(results.Result("federation", *rounds[-1][1:]))
    table += [
        results.Result(label, *series[-1][1:]) for label, series in measured.items() if series and label == _POOLED
    ]
    console.print()
    results.show(console, table, rounds)
    picture = results.write(out, table, rounds)
    adapter = out / "adapter"
    console.print(f"\nPlot: [bold]{picture}[/bold]. Adapter: [bold]{adapter}[/bold]. Load it with", soft_wrap=True)
    click.echo(f'  PeftModel.from_pretrained(model, "{adapter}")')
    click.echo(_NEXT.format(plan=out / "plans" / "federation.yaml"))
