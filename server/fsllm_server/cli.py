"""The command ``fsllm-server``."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click
from click.core import ParameterSource

from fsllm_common import __version__, process
from fsllm_common.errors import Exit, SettingsInvalid
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


@main.command(
    epilog=f"""
\b
fsllm-server backup /mnt/backups/$(date +%F).tar
Exit codes: 0 done, {Exit.CONFIGURATION} the file exists or a setting is wrong, {Exit.STORAGE} disk or state folder.
"""
)
@settings_options(ServerSettings)
@click.argument("file", type=click.Path(path_type=Path))
def backup(settings: ServerSettings, file: Path) -> None:
    """Back the state folder up into the tar FILE; the server may run meanwhile.

    FILE holds the keys of the federation's authority: whoever can read it can admit anybody.
    """
    from fsllm_server.backup import back_up

    os.umask(0o077)
    state = settings.state_dir.absolute()
    with _bar() as tell:
        done = back_up(state, _sqlite_file(settings, state), file, tell=tell)
    click.echo(
        f"{file}: {done.files} files, {done.size / 2**20:.1f} MiB, {done.runs} runs of federation {done.federation!r}."
    )
    click.echo("It holds the authority's keys: keep it secret (it is readable by you only) and off this host.")


@main.command(
    epilog=f"""
\b
fsllm-server restore /mnt/backups/2026-01-31.tar --state-dir /var/lib/fsllm
Exit codes: 0 done, {Exit.CONFIGURATION} the folder is not empty, {Exit.STORAGE} damaged back-up, or full disk.
"""
)
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--state-dir",
    type=click.Path(file_okay=False, path_type=Path),
    default=default_state_dir,
    show_default="the server's",
    show_envvar=True,
    envvar="FSLLM_STATE_DIR",
    help="The folder to make; empty or missing.",
)
def restore(file: Path, state_dir: Path) -> None:
    """Make a state folder from the tar FILE of `backup`. The server that it was made of must not run any more."""
    from fsllm_server import backup as archive

    os.umask(0o077)
    with _bar() as tell:
        done = archive.restore(file, state_dir.absolute(), tell=tell)
    click.echo(
        f"{state_dir} is federation {done.federation!r} as of {done.made}: {done.files} files, {done.runs} runs.\n"
        "Never start the server that it was made of again. What happened since then is not known here:\n"
        "  runs under way are paused at the next start; `fsllm run resume RUN` lets one go on from where it was then\n"
        "  members who were revoked since are members again: revoke them again\n"
        "  join files that were used since work again: revoke those names, or let the files expire"
    )


def _sqlite_file(settings: ServerSettings, state: Path) -> Path:
    """Return the file of the SQLite database.

    Raises:
        SettingsInvalid: The database is another.

    """
    from sqlalchemy import make_url
    from sqlalchemy.exc import ArgumentError

    from fsllm_server.store.folder import DATABASE

    if settings.database is None:
        return state / DATABASE
    try:
        url = make_url(settings.database)
    except ArgumentError as error:
        raise SettingsInvalid(f"database: {error}") from error
    if url.get_backend_name() != "sqlite" or not url.database:
        raise SettingsInvalid(
            f"--database: `backup` can not copy a {url.get_backend_name()} database",
            cure="Use the database's own tool, first, then copy the state folder: docs/operations.md says how.",
        )
    return Path(url.database)


@contextmanager
def _bar() -> Iterator[Callable[[int, int], None]]:
    """Show a bar on standard error, where that is a terminal; yields what sets it."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (BarColumn(), DownloadColumn(binary_units=True), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def _run(settings: ServerSettings) -> None:
    process.prepare()
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
