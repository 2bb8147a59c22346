"""``fsllm-server doctor``: everything that stops a server from starting or going on, looked at beforehand."""

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final, Literal

from sqlalchemy.exc import SQLAlchemyError

from fsllm_common.errors import REASONS, FsllmError
from fsllm_common.identity.authority import CertificateAuthority
from fsllm_common.identity.keys import check_credential, load_credential
from fsllm_server.app import SERVER_FILE
from fsllm_server.ports import try_port
from fsllm_server.settings import ServerSettings
from fsllm_server.store.database import Database
from fsllm_server.store.folder import StateFolder
from fsllm_server.web.readiness import LEAST_FREE

SOON: Final = timedelta(days=90)
"""The authority's end is told so long before."""

RELEASED: Final = datetime(2026, 1, 1, tzinfo=UTC)
"""A clock that is before this is wrong."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check found."""

    check: str
    state: Literal["good", "note", "wrong"]
    detail: str
    cure: str = ""
    reason: str = ""
    """Of something wrong: the error with which a start would end, or the server later."""


def examine(settings: ServerSettings) -> list[Finding]:
    """Run every check. Makes nothing that a start would not make, and holds no lock afterwards."""
    state = settings.state_dir.absolute()
    running = _running(state)
    return [
        *_server(state, running),
        *_ports(settings, running),
        *_disk(state),
        *_authority(state, settings),
        *_certificate(state / "server", "server certificate", running),
        *_certificate(state / "operator", "operator's credential", running),
        *_clock(state),
        *_database(settings, running),
    ]


def exit_code(findings: list[Finding]) -> int:
    """Return 0 when nothing is wrong, else the exit code of the first reason."""
    return next((REASONS[finding.reason].exit for finding in findings if finding.state == "wrong"), 0)


def as_json(findings: list[Finding]) -> str:
    """Return the findings as a JSON array."""
    return json.dumps([asdict(finding) for finding in findings], indent=2)


def as_table(findings: list[Finding]) -> str:
    """Return the findings as a table for a terminal."""
    from rich.console import Console
    from rich.table import Table

    colours = {"good": "green", "note": "yellow", "wrong": "bold red"}
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("check", "state", "detail"):
        table.add_column(heading, overflow="fold")
    for finding in findings:
        detail = f"{finding.detail}\n[dim]{finding.cure}[/dim]" if finding.cure else finding.detail
        table.add_row(finding.check, f"[{colours[finding.state]}]{finding.state}[/]", detail)
    console = Console()
    with console.capture() as captured:
        console.print(table)
    return captured.get().rstrip("\n")


def _wrong(check: str, error: FsllmError) -> Finding:
    return Finding(check, "wrong", error.message, error.cure, error.reason)


def _running(state: Path) -> dict[str, Any] | None:
    """Return what the server of this state folder says of itself; None when none runs."""
    try:
        told: dict[str, Any] = json.loads((state / SERVER_FILE).read_text())
        os.kill(told["pid"], 0)
    except (OSError, ValueError, KeyError):
        return None
    return told


def _server(state: Path, running: dict[str, Any] | None) -> Iterator[Finding]:
    if running is not None:
        yield Finding("server", "good", f"runs as process {running['pid']} on port {running['port']}")
        return
    if not state.exists():
        yield Finding("server", "note", f"has never started with {state}; the first start makes what it needs")
        return
    try:
        StateFolder(state).close()
    except FsllmError as error:
        yield _wrong("server", error)
    else:
        yield Finding("server", "note", f"does not run; its state is in {state}")


def _ports(settings: ServerSettings, running: dict[str, Any] | None) -> Iterator[Finding]:
    wanted = (
        ("port", settings.listen, settings.port),
        ("enrollment_port", settings.listen, settings.chosen_enrollment_port),
        ("metrics_port", settings.metrics_listen, settings.metrics_port),
    )
    for name, host, port in wanted:
        check = name.replace("_", " ")
        if running is not None and running.get(name) == port:
            yield Finding(check, "good", f"{host}:{port} is held by this server")
            continue
        try:
            try_port(host, port)
        except OSError as error:
            cure = f"Stop what holds it, or choose another with --{name.replace('_', '-')}."
            yield Finding(check, "wrong", f"{host}:{port} can not be opened: {error.strerror}", cure, "PORT_IN_USE")
        else:
            yield Finding(check, "good", f"{host}:{port} is free")


def _disk(state: Path) -> Iterator[Finding]:
    existing = next(folder for folder in (state, *state.parents) if folder.exists())
    if not os.access(existing, os.W_OK):
        cure = "Mend its owner, or choose another --state-dir."
        yield Finding("disk", "wrong", f"{existing} can not be written", cure, "SETTING_INVALID")
        return
    free = shutil.disk_usage(existing).free
    detail = f"{free / 2**30:.1f} GiB free under {existing}"
    if free < LEAST_FREE:
        yield Finding("disk", "wrong", detail, "Free space: uploads and versions are kept there.", "DISK_FULL")
    else:
        yield Finding("disk", "good", detail)


def _authority(state: Path, settings: ServerSettings) -> Iterator[Finding]:
    try:
        authority = CertificateAuthority.load(state / "authority")
        federation = (state / "federation").read_text().strip()
    except FileNotFoundError:
        return
    except FsllmError as error:
        yield _wrong("authority", error)
        return
    if settings.federation not in (None, federation):
        detail = f"the state folder is of the federation {federation!r}, not {settings.federation!r}"
        cure = "Leave --federation out, or choose another --state-dir."
        yield Finding("federation", "wrong", detail, cure, "SETTING_INVALID")
    end = authority.certificate.not_valid_after_utc
    detail = f"of federation {federation!r}, until {end:%Y-%m-%d}"
    if end - datetime.now(UTC) < SOON:
        cure = "Found a new federation in another state folder and invite all sites."
        yield Finding("authority", "wrong", detail, cure, "CERTIFICATE_EXPIRED")
    else:
        yield Finding("authority", "good", detail)
    mode = (state / "authority" / "authority.pem").stat().st_mode & 0o777
    if mode & 0o077:
        cure = f"Run chmod 600 {state / 'authority' / 'authority.pem'}; whoever has read it can admit anybody."
        yield Finding("authority's key", "wrong", f"others may read it (mode {mode:o})", cure, "STATE_CORRUPT")


def _certificate(folder: Path, check: str, running: dict[str, Any] | None) -> Iterator[Finding]:
    try:
        credential = load_credential(folder)
        check_credential(credential)
    except FsllmError as error:
        # The next start makes a new one whatever is there.
        if running is not None:
            yield Finding(check, "wrong", error.message, "Restart the server: it makes a new one.", error.reason)
        elif error.reason != "NOT_ENROLLED":
            yield Finding(check, "note", f"{error.message}; the next start makes a new one")
    else:
        yield Finding(check, "good", f"until {credential.certificate.not_after:%Y-%m-%d %H:%M} UTC")


def _clock(state: Path) -> Iterator[Finding]:
    """Check the clock against what is certain: this release, and the newest file that the server has written."""
    now = datetime.now(UTC)
    written = [datetime.fromtimestamp(path.stat().st_mtime, UTC) for path in state.glob("*")] if state.exists() else []
    latest = max([RELEASED, *written])
    if now < latest - timedelta(minutes=5):
        detail = f"says {now:%Y-%m-%d %H:%M} UTC, but the state folder was written at {latest:%Y-%m-%d %H:%M} UTC"
        cure = "Set the clock: certificates that are not valid yet are refused."
        yield Finding("clock", "wrong", detail, cure, "CERTIFICATE_EXPIRED")
    else:
        yield Finding("clock", "good", f"says {now:%Y-%m-%d %H:%M} UTC")


def _database(settings: ServerSettings, running: dict[str, Any] | None) -> Iterator[Finding]:
    if running is not None:
        yield Finding("database", "good", "in use by the running server")
        return
    file = settings.state_dir.absolute() / "fsllm.sqlite3"
    if settings.database is None and not file.exists():
        yield Finding("database", "note", f"{file} will be made by the first start")
        return
    try:
        Database(settings.database or f"sqlite:///{file}").close()
    except FsllmError as error:
        yield _wrong("database", error)
    except SQLAlchemyError as error:
        detail = f"can not be opened: {type(error).__name__}"
        yield Finding("database", "wrong", detail, "Check --database.", "SETTING_INVALID")
    else:
        yield Finding("database", "good", "opens, and its schema is this version's")
