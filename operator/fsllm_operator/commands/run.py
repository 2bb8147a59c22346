"""``fsllm run``."""

import json
import uuid
from pathlib import Path

import click
from rich.table import Table

from fsllm.v1.control_pb2 import (
    CancelRunRequest,
    ListRunsRequest,
    PauseRunRequest,
    ResumeRunRequest,
    Run,
    SubmitRunRequest,
)
from fsllm_common.plan import canonical_json, plan_from_file
from fsllm_operator.as_json import manifest_object, run_object
from fsllm_operator.connection import Connection
from fsllm_operator.console import stdout
from fsllm_operator.display import run_display
from fsllm_operator.options import connected, json_option
from fsllm_operator.watching import STATUS_NAMES, Watched


@click.group()
def run() -> None:
    """Submit, watch, steer and export runs.

    RUN is a run's id, the beginning of it, or a name that only one run has.
    """


@run.command(
    epilog="""
\b
fsllm run submit plan.yaml --watch
Exit codes with --watch: 0 the run is done; 11 it is paused or was cancelled; 130 Ctrl-C (the run goes on).
"""
)
@connected
@click.argument("plan", type=click.Path(path_type=Path))
@click.option("--watch", is_flag=True, help="Show it live until it ends.")
@json_option
def submit(connection: Connection, plan: Path, watch: bool, as_json: bool) -> None:
    """Check the PLAN and start it as a run."""
    request = SubmitRunRequest(plan=canonical_json(plan_from_file(plan)), request_id=uuid.uuid4().hex)
    started = connection.call(connection.control.SubmitRun, request, repeat=True).run
    if as_json:
        click.echo(json.dumps(run_object(started), indent=None if watch else 2))
    else:
        click.echo(f"Run {started.run_id} ({started.name}) is submitted.")
    if watch:
        _watch(connection, started, as_json)
    elif not as_json:
        click.echo(f"  fsllm run watch {started.run_id}")


@run.command("list")
@connected
@json_option
def list_runs(connection: Connection, as_json: bool) -> None:
    """Show every run, the newest first."""
    runs = sorted(
        connection.call(connection.control.ListRuns, ListRunsRequest(), repeat=True).runs,
        key=lambda r: (r.created.seconds, r.created.nanos),
        reverse=True,
    )
    if as_json:
        click.echo(json.dumps([run_object(r) for r in runs], indent=2))
        return
    if not runs:
        click.echo("No runs yet. Submit one: fsllm run submit plan.yaml")
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("run", "name", "status", "round", "phase", "created (UTC)", "message"):
        table.add_column(heading)
    for r in runs:
        created = r.created.ToDatetime().strftime("%Y-%m-%d %H:%M")
        table.add_row(r.run_id, r.name, STATUS_NAMES[r.status], f"{r.round}/{r.rounds}", r.phase, created, r.message)
    stdout().print(table)


@run.command()
@connected
@click.argument("run_id", metavar="RUN")
@json_option
def show(connection: Connection, run_id: str, as_json: bool) -> None:
    """Show all of a run: members, every committed round, its metrics; with --json its plan and manifests too."""
    found = connection.run(run_id)
    if as_json:
        manifests = [manifest_object(manifest) for manifest in connection.manifests(found.run_id)]
        click.echo(json.dumps({**run_object(found), "manifests": manifests}, indent=2))
    else:
        stdout().print(run_display(Watched.of(found), all_rounds=True))


@run.command(
    epilog="\b\nExit codes: 0 the run is done; 11 it is paused or was cancelled; 130 Ctrl-C (the run goes on)."
)
@connected
@click.argument("run_id", metavar="RUN")
@json_option
def watch(connection: Connection, run_id: str, as_json: bool) -> None:
    """Show a run live until it ends or is paused; with --json one event a line.

    The server may restart meanwhile: the display goes on where it stood.
    """
    _watch(connection, connection.run(run_id), as_json)


def _watch(connection: Connection, watched: Run, as_json: bool) -> None:
    from fsllm_operator.watch import follow

    follow(connection, watched, as_json=as_json)


@run.command()
@connected
@click.argument("run_id", metavar="RUN")
@json_option
def pause(connection: Connection, run_id: str, as_json: bool) -> None:
    """Pause a run: orders are withdrawn, updates that were delivered are kept."""
    _say(connection.call(connection.control.PauseRun, PauseRunRequest(run_id=run_id), repeat=True).run, as_json)


@run.command()
@connected
@click.argument("run_id", metavar="RUN")
@json_option
def resume(connection: Connection, run_id: str, as_json: bool) -> None:
    """Let a paused run go on where it stood."""
    _say(connection.call(connection.control.ResumeRun, ResumeRunRequest(run_id=run_id)).run, as_json)


@run.command()
@connected
@click.argument("run_id", metavar="RUN")
@click.option("--yes", is_flag=True, help="Do not ask.")
@json_option
def cancel(connection: Connection, run_id: str, yes: bool, as_json: bool) -> None:
    """End a run for good. Its committed versions stay and can be exported."""
    if not yes:
        click.confirm(f"Cancel run {run_id}? It can not be resumed", abort=True)
    _say(connection.call(connection.control.CancelRun, CancelRunRequest(run_id=run_id)).run, as_json)


@run.command(
    epilog="""
\b
fsllm run export my-run -o adapter/
python -c "from peft import PeftModel; ..."      the exported README.md shows how to load it
"""
)
@connected
@click.argument("run_id", metavar="RUN")
@click.option("-o", "--output", required=True, type=click.Path(file_okay=False, path_type=Path), help="The folder.")
@click.option("--version", type=click.IntRange(min=0), help="A committed version. Default: the latest.")
@click.option("--force", is_flag=True, help="Replace an adapter that lies there already.")
@json_option
def export(connection: Connection, run_id: str, output: Path, version: int | None, force: bool, as_json: bool) -> None:
    """Write a run's adapter as a folder that PeftModel.from_pretrained loads, with a README card.

    A download that broke goes on where it stood when the same command is given again.
    """
    from fsllm_operator.export import export_run

    exported = export_run(connection, connection.run(run_id), output, version, force=force)
    if as_json:
        click.echo(json.dumps(exported.as_object(), indent=2))
    else:
        click.echo(
            f"Version {exported.version} of {exported.name} is in {output}: {exported.tensors} tensors, verified."
        )
        click.echo(f"  {output / 'README.md'} says how to load it.")


@run.command(
    epilog="""
\b
A round is one of
  recomputed   its manifest and versions are what was recorded, and adding its uploads up again gave the same bits
  chain only   manifest and versions are what was recorded; its uploads are not kept (--keep-spools-rounds)
  BROKEN       something was changed after the commit; the last column says what
Exit codes: 0 no round is broken, 9 one is.
"""
)
@connected
@click.argument("run_id", metavar="RUN")
@click.option("--round", "round_", type=click.IntRange(min=0), help="Only this round. Default: all committed ones.")
@click.option(
    "--against",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="The manifests.json of an earlier export: the server must not say otherwise now.",
)
@json_option
def verify(connection: Connection, run_id: str, round_: int | None, against: Path | None, as_json: bool) -> None:
    """Check that every committed round is what it was, from its uploads where they are kept.

    The server reads everything again; the chain of the manifests is checked here.
    """
    from rich.console import Console

    from fsllm_operator import verify as verifying

    copy = verifying.read_copy(against) if against is not None else ()
    found = connection.run(run_id)
    with verifying.progress_bar(Console(stderr=True)) as bar:
        task = bar.add_task("", total=None)
        verified = verifying.verify_run(
            connection,
            found,
            round_,
            copy=copy,
            tell=lambda p: bar.update(
                task, description=f"round {p.round}", completed=p.done_bytes, total=p.total_bytes
            ),
        )
    if as_json:
        click.echo(json.dumps([one.as_object() for one in verified], indent=2))
    elif verified:
        stdout().print(verifying.table(verified))
        click.echo(f"The last manifest's digest stands for all of this: {verified[-1].manifest}")
    else:
        click.echo("No round is committed yet.")
    verifying.demand_sound(found, verified)


def _say(changed: Run, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(run_object(changed), indent=2))
    else:
        message = f": {changed.message}" if changed.message else ""
        click.echo(f"Run {changed.run_id} ({changed.name}) is {STATUS_NAMES[changed.status]}{message}")
