"""The command ``fsllm-server``."""

import os
from typing import TYPE_CHECKING, Final

import click
from click.core import ParameterSource

from fsllm_common import __version__
from fsllm_common.errors import Exit
from fsllm_common.failure import FailureGroup
from fsllm_common.settings import settings_options
from fsllm_server.settings import ServerSettings, default_state_dir

if TYPE_CHECKING:
    from fsllm_server.app import Started


_EPILOG: Final = f"""
\b
Signals: SIGTERM and SIGINT end the server; what it has acknowledged is kept.
Exit codes: 0 ended by a signal, {Exit.USAGE} wrong usage, {Exit.CONFIGURATION} setting or plan,
{Exit.UNAVAILABLE} a port in use, {Exit.STORAGE} disk or state folder. docs/errors.md lists every reason and its cure.
"""


@click.group(
    cls=FailureGroup,
    epilog=_EPILOG,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@click.version_option(__version__, prog_name="fsllm-server")
@settings_options(ServerSettings)
@click.pass_context
def main(context: click.Context, settings: ServerSettings) -> None:
    """Run the server of a federation. It needs no flag: the first start makes all it needs in its state folder."""
    if context.invoked_subcommand is None:
        _run(settings)
    elif any(context.get_parameter_source(name) is ParameterSource.COMMANDLINE for name in context.params):
        raise click.UsageError(f"Settings stand after the command: fsllm-server {context.invoked_subcommand} ...")


@main.command(epilog="Exit codes: 0 when nothing is wrong, else that of the first thing wrong (docs/errors.md).")
@settings_options(ServerSettings)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def doctor(context: click.Context, settings: ServerSettings, as_json: bool) -> None:
    """Check ports, certificates, clock, disk and database."""
    from fsllm_server import doctor as checks

    findings = checks.examine(settings)
    click.echo(checks.as_json(findings) if as_json else checks.as_table(findings))
    context.exit(checks.exit_code(findings))


def _run(settings: ServerSettings) -> None:
    # The core's own lines (one a failed handshake) are no JSON and name no cause that the peer is not told.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    os.umask(0o077)  # whatever it writes is its own
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
