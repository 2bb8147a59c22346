"""The command ``fsllm-client``: a site's (or evaluator's) daemon, and what a site's people ask about it."""

import asyncio
import json
import os
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import click

from fsllm_client.settings import ClientSettings, DoctorSettings, SiteSettings
from fsllm_client.site.state import StateFolder
from fsllm_common import __version__, process
from fsllm_common.errors import Exit
from fsllm_common.failure import FailureGroup
from fsllm_common.settings import settings_options

_START: Final = "start"
_EPILOG: Final = f"""
\b
The first time, with the join file from the operator, and ever after:
  fsllm-client --server HOST:50051 --data ./private --join hospital-a.join
  fsllm-client --server HOST:50051 --data ./private

\b
Signals: SIGTERM and SIGINT end the daemon, SIGHUP reads the policy again.
Exit codes: 0 ended by a signal, {Exit.USAGE} wrong usage, {Exit.CONFIGURATION} setting or policy, {Exit.DATA} data,
{Exit.MODEL} model, {Exit.IDENTITY} identity, {Exit.REFUSED} refused, {Exit.UNAVAILABLE} server not reached,
{Exit.STORAGE} disk or state folder. docs/errors.md lists every reason and its cure.
"""


class Root(FailureGroup):
    """The group of commands; without the name of one it starts the daemon."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Put ``start`` before flags that are not the group's own."""
        if not args or (args[0].startswith("-") and args[0] not in ("-h", "--help", "--version")):
            args = [_START, *args]
        return super().parse_args(ctx, args)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Show the daemon's settings, then the commands."""
        start = self.commands[_START]
        with formatter.section("Settings of the daemon"):
            records = [record for option in start.params if (record := option.get_help_record(ctx)) is not None]
            formatter.write_dl(records)
        super().format_options(ctx, formatter)


@click.group(
    cls=Root, epilog=_EPILOG, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110}
)
@click.version_option(__version__, prog_name="fsllm-client")
def main() -> None:
    """Take part in a federation: train on this site's own data, send adapters and nothing else."""


_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@main.command(name=_START)
@settings_options(ClientSettings)
def start(settings: ClientSettings) -> None:
    """Run the daemon; the command name may be left out."""
    process.prepare()
    # The daemon's imports (gRPC, metrics) are not for the small commands.
    from fsllm_client.daemon import Daemon
    from fsllm_client.reporting import Silent, Terminal
    from fsllm_common.telemetry import logs

    with Terminal() if sys.stderr.isatty() and settings.log_format != "json" else Silent() as display:
        logs.configure(settings.log_level, settings.log_format, sys.stderr)
        asyncio.run(Daemon(settings, display).run())


@main.command()
@settings_options(SiteSettings)
@_json
def runs(settings: SiteSettings, as_json: bool) -> None:
    """List the runs that were offered to this site."""
    from fsllm_client.site.runs import RunBook

    known = RunBook(StateFolder.existing(settings.state_dir).runs).all()
    if as_json:
        click.echo(json.dumps([asdict(run) for run in known], indent=2))
        return
    if not known:
        click.echo("No run has been offered to this site yet.")
    for run in known:
        click.echo(f"{run.run_id}  {run.name}  {run.standing}  {run.since}  {run.message}".rstrip())


@main.command()
@click.argument("run")
@settings_options(SiteSettings)
def accept(run: str, settings: SiteSettings) -> None:
    """Accept a run that waits for a person: its id, the beginning of it, or its name."""
    from fsllm_client.site.runs import RunBook

    state = StateFolder.existing(settings.state_dir)
    book = RunBook(state.runs)
    found = book.accept(run)
    click.echo(f"Accepted {found.run_id} ({found.name}). Its plan: {book.plan(found.run_id)}")
    if (pid := state.daemon_pid()) is not None:
        os.kill(pid, signal.SIGHUP)
    else:
        click.echo("No daemon runs in this state folder; the run begins here when one is started.")


@main.command()
@click.argument("run")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--force", is_flag=True, help="Replace an adapter that is in FOLDER.")
@settings_options(SiteSettings)
@_json
def export(run: str, folder: Path, force: bool, settings: SiteSettings, as_json: bool) -> None:
    """Write the adapter that a personalised RUN has made for this site alone to FOLDER, as PEFT loads it."""
    from fsllm_client.site.own_adapter import export_own
    from fsllm_client.site.runs import RunBook

    state = StateFolder.existing(settings.state_dir)
    book = RunBook(state.runs)
    found = book.find(run)
    own = export_own(state.private(found.run_id), book.plan(found.run_id), folder, force=force)
    if as_json:
        click.echo(json.dumps({"run_id": found.run_id, "folder": str(folder), **asdict(own)}, indent=2))
        return
    made = f", of version {own.version}" if own.version is not None else ""
    if own.round != own.version:
        made += f" and what this site has trained in round {own.round}"
    click.echo(f"Wrote this site's own adapter of {found.run_id} ({found.name}){made}: {own.tensors} tensors, {folder}")
    if own.mixed:
        click.echo("The model mixes it with the adapter in its folder rest, token by token, by mixer.safetensors.")


@main.command()
@settings_options(SiteSettings)
@_json
def ledger(settings: SiteSettings, as_json: bool) -> None:
    """Show every noised release that left this site, and the privacy it cost."""
    from fsllm_client.site.ledger import Ledger

    releases = Ledger(StateFolder.existing(settings.state_dir).ledger).releases
    if as_json:
        click.echo(json.dumps([asdict(release) for release in releases], indent=2))
        return
    if not releases:
        click.echo("Nothing with noise has left this site; what left without noise is not differentially private.")
        return
    click.echo(f"{'at':20}  {'run':24}  {'round':>5}  {'clip':>8}  {'noise':>8}  {'epsilon':>8}  {'in all':>8}")
    for r in releases:
        click.echo(
            f"{r.at[:19]:20}  {r.run_name[:24]:24}  {r.round:5}  {r.clip_norm:8.4g}  {r.multiplier:8.4g}  "
            f"{r.epsilon:8.4g}  {r.epsilon_total:8.4g}"
        )


@main.command()
@click.argument("plan", type=click.Path(path_type=Path))
@click.option("--role", type=click.Choice(["site", "evaluator"]), default="site", help="Which part this member has.")
@settings_options(SiteSettings)
@_json
def explain(plan: Path, role: Any, settings: SiteSettings, as_json: bool) -> None:  # noqa: ANN401 (click gives a str)
    """Say what PLAN would send from this site, to the byte, and whether the site's policy accepts it."""
    from fsllm_client.site.explain import explain as explain_plan
    from fsllm_client.site.explain import lines
    from fsllm_client.site.machine import Machine
    from fsllm_client.site.policy import Policy
    from fsllm_common.plan import plan_from_file

    path = settings.policy or StateFolder(settings.state_dir, make=False).policy
    # A file that was named has to be there; without one the daemon would begin with the defaults, too.
    policy = Policy.read(path) if settings.policy is not None or path.exists() else Policy()
    found = explain_plan(plan_from_file(plan), policy, role, Machine.look())
    if as_json:
        click.echo(json.dumps(asdict(found), indent=2))
        return
    for line in lines(found):
        click.echo(line)


_MARKS: Final = {"ok": ("ok", "green"), "warning": ("warn", "yellow"), "failed": ("FAIL", "red")}


@main.command(epilog="Exit codes: 0 when nothing failed, else that of the first failure (docs/errors.md).")
@settings_options(DoctorSettings)
@_json
@click.pass_context
def doctor(ctx: click.Context, settings: DoctorSettings, as_json: bool) -> None:
    """Check what a run needs: server, certificate, clock, disk, GPU and compiler, models, data."""
    from fsllm_client.site.doctor import examine, exit_code

    checks = asyncio.run(examine(settings))
    if as_json:
        click.echo(json.dumps([asdict(check) for check in checks], indent=2))
    else:
        width = max(len(check.name) for check in checks)
        for check in checks:
            mark, colour = _MARKS[check.outcome]
            click.echo(f"{click.style(f'{mark:5}', fg=colour)} {check.name:{width}}  {check.message}")
            if check.cure and check.outcome != "ok":
                click.echo(f"{'':6}{'':{width}}  {check.cure}")
    ctx.exit(exit_code(checks))


@main.group()
def model() -> None:
    """Look at base models."""


@model.command()
@click.argument("folder", type=click.Path(path_type=Path))
def digest(folder: Path) -> None:
    """Print the digest of a model folder's weights, for a plan's model.digest."""
    from fsllm_client.site.model import model_digest

    click.echo(model_digest(folder))
