"""The command ``fsllm-server``."""

import os
import sys
from typing import TYPE_CHECKING

import click

from fsllm_common import __version__
from fsllm_common.errors import FsllmError
from fsllm_common.settings import settings_options
from fsllm_server.settings import ServerSettings, default_state_dir

if TYPE_CHECKING:
    from fsllm_server.app import Started


@click.group(invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="fsllm-server")
@settings_options(ServerSettings)
@click.pass_context
def command(context: click.Context, settings: ServerSettings) -> None:
    """Run the server of a federation. It needs no flag: the first start makes all it needs in its state folder."""
    if context.invoked_subcommand is None:
        _run(settings)


@command.command()
@settings_options(ServerSettings)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def doctor(context: click.Context, settings: ServerSettings, as_json: bool) -> None:
    """Check ports, certificates, clock, disk and database; exit with 1 when something is wrong."""
    from fsllm_server import doctor as checks

    findings = checks.examine(settings)
    click.echo(checks.as_json(findings) if as_json else checks.as_table(findings))
    context.exit(1 if any(finding.state == "wrong" for finding in findings) else 0)


def main() -> None:
    """Run the command; a known error becomes one line and its documented exit code."""
    try:
        command(prog_name="fsllm-server")
    except FsllmError as error:
        click.echo(f"fsllm-server: {error}", err=True)
        sys.exit(error.exit_code)


def _run(settings: ServerSettings) -> None:
    # The core's own lines (one a failed handshake) are no JSON and name no cause that the peer is not told.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    import asyncio

    from fsllm_common.plan.load import plan_from_file
    from fsllm_common.telemetry.logs import configure
    from fsllm_server.app import serve

    configure(settings.log_level, settings.log_format)
    plan = plan_from_file(settings.run) if settings.run is not None else None
    asyncio.run(serve(settings, plan, lambda started: _tell(settings, started)))


def _tell(settings: ServerSettings, started: "Started") -> None:
    """Say where the server answers and what to type next."""
    state = settings.state_dir.absolute()
    fsllm = "fsllm" if state == default_state_dir() else f"FSLLM_STATE_DIR={state} fsllm"
    lines = [
        f"fsllm-server {__version__}, federation {started.federation!r}, serves.",
        f"  members and operators  {settings.listen}:{started.port}  (mutual TLS)",
        f"  newcomers              {settings.listen}:{started.enrollment_port}  (join files)",
        f"  metrics                http://{settings.metrics_listen}:{started.metrics_port}/metrics",
        f"  state                  {state}",
        f"  names                  {', '.join(settings.certificate_hosts)}  (--host NAME adds one)",
    ]
    if started.first_start:
        lines += [
            "First start: the federation's certificate authority and the credential of this host's operator were made.",
            f"  Back the state folder up and keep it secret: {state / 'authority'} can admit anybody.",
        ]
    lines += [
        "Next, on this host and as this user:",
        f"  {fsllm} site invite hospital-a -o hospital-a.join",
        "then at the site:",
        f"  fsllm-client --server {settings.public_host}:{started.port} --data FOLDER --join hospital-a.join",
    ]
    click.echo("\n".join(lines))
