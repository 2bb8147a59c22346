"""Back-up of a state folder into one tar file, while the server runs, and its restoration into an empty folder.

The database is copied first, in one transaction, then the files that its logs name; uploads are kept from being removed
meanwhile, and versions never are. So the archive holds every file that its logs name. Its last member lists the digest
of every other: an archive that was cut off or changed is not restored.
"""

from __future__ import annotations

import json
import os
import secrets
import sqlite3
import tarfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import IO, Any, Final
from urllib.parse import quote

from blake3 import blake3

from fsllm_common import __version__
from fsllm_common.errors import FsllmError, SettingsInvalid
from fsllm_common.failpoints import reach
from fsllm_common.files import disk_errors, sync_folder, write_atomic
from fsllm_server.engine.replaying import replay
from fsllm_server.engine.state import Run
from fsllm_server.store.events import Entry
from fsllm_server.store.files import shared
from fsllm_server.store.folder import BLOBS, DATABASE, SPOOLS
from fsllm_server.store.layout import LAYOUT, RESTORING, refuse_unfinished
from fsllm_server.store.restored import RESTORED, Restoration
from fsllm_server.store.spools import KEEP, member_folder

HEADER: Final = "backup.json"
DIGESTS: Final = "digests.json"

_PIECE: Final = 1 << 20
_MOST_DIGESTS: Final = 1 << 30
"""Bytes of the list of digests that are read into memory."""


@dataclass(frozen=True, slots=True)
class BackedUp:
    """What an archive holds."""

    federation: str
    made: str
    """ISO 8601, UTC."""
    runs: int
    files: int
    size: int
    """Bytes of all files."""


def back_up(
    state: Path, database: Path, target: Path, *, tell: Callable[[int, int], None] = lambda _done, _total: None
) -> BackedUp:
    """Write everything that the server keeps in ``state`` into the tar file ``target``, readable by its owner only.

    Args:
        state: The state folder.
        database: Its SQLite database.
        target: Must not exist.
        tell: Called with the bytes written and those to write.

    Raises:
        SettingsInvalid: There is no server's state, or the target exists or can not be made.
        FsllmError: STATE_CORRUPT: the log names a file that is not there. STATE_NEWER. DISK_FULL.

    """
    refuse_unfinished(state)
    layout = LAYOUT.of(state) if (state / SPOOLS).is_dir() else None
    if layout is None or not database.exists():
        what = f"{state} holds no server's state" if layout is None else f"there is no database {database}"
        raise SettingsInvalid(f"--state-dir: {what}", cure="Name the folder with which the server runs.")
    LAYOUT.demand_known(layout, f"state folder {state}")
    with _fresh(target) as out, shared(state / SPOOLS / KEEP), _snapshot(database, target) as snapshot:
        runs = _runs(snapshot)
        files = [(DATABASE, snapshot), *_secrets(state), *_payloads(state, runs)]
        made = datetime.now(UTC).isoformat(timespec="seconds")
        federation = (state / "federation").read_text().strip()
        header = {"made": made, "layout": layout, "software": __version__, "federation": federation}
        total = sum(path.stat().st_size for _, path in files)
        digests: dict[str, str] = {}
        done = 0
        with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
            digests[HEADER] = _add_text(tar, HEADER, header)
            for name, path in files:
                with path.open("rb") as file:
                    digests[name] = _add(tar, name, file, os.fstat(file.fileno()).st_size)
                    done += file.tell()
                tell(done, total)
            _add_text(tar, DIGESTS, digests)
    return BackedUp(federation, made, len(runs), len(files), total)


def restore(archive: Path, state: Path, *, tell: Callable[[int, int], None] = lambda _done, _total: None) -> BackedUp:
    """Make the state folder ``state`` from an archive. What was cut off leaves a folder that no server starts from.

    Args:
        archive: Of ``back_up``.
        state: Empty or missing.
        tell: Called with the bytes read and those of the archive.

    Raises:
        SettingsInvalid: The folder is not empty, or the archive can not be read.
        FsllmError: BACKUP_INVALID: the archive is none, was cut off or changed. STATE_NEWER, DISK_FULL.

    """
    if state.exists() and (not state.is_dir() or any(state.iterdir())):
        raise SettingsInvalid(f"--state-dir: {state} is not empty", cure="Name an empty folder, or one to be made.")
    try:
        size = archive.stat().st_size
        tar = tarfile.open(archive, "r:")  # noqa: SIM115 - closed below
    except OSError as error:
        raise SettingsInvalid(f"{archive}: {error.strerror}", cure="Name a file that `backup` has made.") from error
    except tarfile.TarError as error:
        raise _invalid(archive, "it is no tar file") from error
    with closing(tar), disk_errors(state):
        try:
            state.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_atomic(state / RESTORING, b"", mode=0o600)
        except PermissionError as error:
            raise SettingsInvalid(f"--state-dir: {state}: {error.strerror}") from error
        try:
            header, digests, total = _extract(archive, tar, state, lambda done: tell(done, size))
        except (tarfile.TarError, EOFError) as error:
            raise _invalid(archive, "it is cut off or damaged") from error
        made = str(header["made"])
        Restoration(secrets.token_hex(4), made).save(state / RESTORED)
        for folder in sorted({path.parent for path in state.rglob("*")}):
            sync_folder(folder)
        (state / RESTORING).unlink()
        sync_folder(state)
    runs = len(_runs(state / DATABASE))
    return BackedUp(str(header["federation"]), made, runs, len(digests) - 1, total)


# What goes in.


def _runs(database: Path) -> list[Run]:
    """Return the state of every run.

    Raises:
        FsllmError: STATE_CORRUPT.

    """
    runs = []
    with closing(sqlite3.connect(database)) as connection:
        connection.row_factory = sqlite3.Row
        for (run_id,) in connection.execute("SELECT id FROM runs ORDER BY created, id").fetchall():
            rows = connection.execute("SELECT * FROM events WHERE run_id = ? ORDER BY sequence", (run_id,))
            # A folder that this version has not migrated yet has no column for manifests.
            entries = (
                Entry(row["sequence"], row["at"], row["kind"], row["body"], dict(row).get("manifest")) for row in rows
            )
            last = None
            for step in replay(run_id, entries):
                last = step.run
            if last is not None:
                runs.append(last)
    return runs


def _secrets(state: Path) -> Iterator[tuple[str, Path]]:
    """Yield name and path of every file that is neither payload nor database."""
    for top in ("federation", "layout"):
        if (state / top).exists():
            yield top, state / top
    for folder in ("authority", "operator", "server"):
        for path in sorted((state / folder).rglob("*")):
            if path.is_file() and not path.name.startswith("."):  # a file that is being replaced begins with a dot
                yield path.relative_to(state).as_posix(), path


def _payloads(state: Path, runs: list[Run]) -> Iterator[tuple[str, Path]]:
    """Yield name and path of every file that the runs' logs name, each once.

    Raises:
        FsllmError: STATE_CORRUPT: one is not there.

    """
    seen: set[Path] = set()
    for run in runs:
        for path, needed in [*_blobs(state, run), *_spools(state, run)]:
            if path in seen or not (needed or path.exists()):
                continue
            if not path.exists():
                raise FsllmError("STATE_CORRUPT", f"run {run.id}: {path} is missing")
            seen.add(path)
            yield path.relative_to(state).as_posix(), path


def _blobs(state: Path, run: Run) -> Iterator[tuple[Path, bool]]:
    for version in (run.zero, run.candidate, *(commit.version for commit in run.commits)):
        if version is not None:
            for digest in version.blobs:
                for name in ("manifest", "payload"):
                    yield state / BLOBS / digest / name, True


def _spools(state: Path, run: Run) -> Iterator[tuple[Path, bool]]:
    """Yield what is acknowledged of the round in progress, which must be there, and what is kept of those before."""
    kept = [(c.update, False) for commit in run.commits for c in commit.contributions]
    waiting = [] if run.status.ended else [(update, True) for update in run.updates.values()]
    for update, needed in [*kept, *waiting]:
        payload = member_folder(state / SPOOLS, run.id, update.round, update.member) / update.digest
        yield payload, needed
        yield payload.with_suffix(".manifest"), needed


@contextmanager
def _snapshot(database: Path, target: Path) -> Iterator[Path]:
    """Yield a copy of the database as it is at one instant."""
    copy = target.with_name(f".{target.name}.{secrets.token_hex(4)}.sqlite3")
    try:
        os.close(os.open(copy, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        with (
            disk_errors(target.parent),
            closing(sqlite3.connect(f"file:{quote(str(database))}?mode=ro", uri=True)) as source,
            closing(sqlite3.connect(copy)) as destination,
        ):
            source.backup(destination)
            # One file, not three: the copy is read but never written.
            destination.execute("PRAGMA journal_mode=DELETE")
        yield copy
    except sqlite3.Error as error:
        raise FsllmError("STATE_CORRUPT", f"database {database}: {error}") from error
    finally:
        copy.unlink(missing_ok=True)


@contextmanager
def _fresh(target: Path) -> Iterator[IO[bytes]]:
    """Yield a new file, durable when the block is left; after an error it is gone."""
    try:
        descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        raise SettingsInvalid(f"{target} exists", cure="Name another file; a back-up replaces nothing.") from None
    except OSError as error:
        raise SettingsInvalid(f"{target}: {error.strerror}", cure="Name a file in a folder that you may write.") from (
            error
        )
    try:
        with disk_errors(target.parent):
            with os.fdopen(descriptor, "wb") as file:
                yield file
                file.flush()
                reach("file.sync")
                os.fsync(file.fileno())
            sync_folder(target.absolute().parent)
    except BaseException:
        target.unlink(missing_ok=True)
        raise


class _Hashed:
    """A file that takes the digest of what is read from it."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.hash = blake3()

    def read(self, size: int) -> bytes:
        data = self._file.read(size)
        self.hash.update(data)
        return data


def _add(tar: tarfile.TarFile, name: str, file: IO[bytes], size: int) -> str:
    """Add a member and return its digest."""
    info = tarfile.TarInfo(name)
    info.size, info.mode, info.mtime = size, 0o600, int(datetime.now(UTC).timestamp())
    hashed = _Hashed(file)
    tar.addfile(info, hashed)  # type: ignore[arg-type]  # it only reads
    return hashed.hash.hexdigest()


def _add_text(tar: tarfile.TarFile, name: str, value: object) -> str:
    data = json.dumps(value, indent=1, sort_keys=True).encode() + b"\n"
    return _add(tar, name, BytesIO(data), len(data))


# What comes out.


def _extract(
    archive: Path, tar: tarfile.TarFile, state: Path, tell: Callable[[int], None]
) -> tuple[dict[str, Any], dict[str, str], int]:
    """Write every member under ``state`` and return header, digests and bytes, once all digests are right."""
    header: dict[str, Any] | None = None
    found: dict[str, str] = {}
    total = 0
    for member in tar:
        content = tar.extractfile(member) if member.isreg() else None
        if content is None:
            raise _invalid(archive, f"{member.name!r} is no file")
        if header is None:
            text = content.read(_PIECE)
            header = _header(archive, member, BytesIO(text))
            found[HEADER] = blake3(text).hexdigest()
        elif member.name == DIGESTS:
            digests = _read_json(archive, content)
            if digests != found:
                wrong = sorted(name for name in {*digests, *found} if digests.get(name) != found.get(name))
                raise _invalid(archive, f"{wrong[0]} is not what was backed up")
            return header, found, total
        else:
            found[member.name] = _write(archive, member, content, state)
            total += member.size
        tell(tar.offset)
    raise _invalid(archive, "it is cut off: the list of digests is missing")


def _header(archive: Path, member: tarfile.TarInfo, content: IO[bytes]) -> dict[str, Any]:
    if member.name != HEADER:
        raise _invalid(archive, "it is no back-up of an fsllm-server")
    header = _read_json(archive, content)
    if not isinstance(header.get("layout"), int) or {"made", "federation"} - header.keys():
        raise _invalid(archive, f"{HEADER} is incomplete")
    LAYOUT.demand_known(header["layout"], f"{archive} (of fsllm {header.get('software')})")
    return header


def _write(archive: Path, member: tarfile.TarInfo, content: IO[bytes], state: Path) -> str:
    """Write one member, synced, and return its digest."""
    # A regular file: that was seen to. (tarfile's own filters came with Python 3.11.4.)
    name = PurePosixPath(member.name)
    if name.is_absolute() or ".." in name.parts or name.parts[:1] in ((), (RESTORING,), (RESTORED,), ("lock",)):
        raise _invalid(archive, f"{member.name!r} has no place in a state folder")
    path = state / name
    try:
        for folder in reversed(path.parents):
            if folder.is_relative_to(state):
                folder.mkdir(mode=0o700, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except (FileExistsError, NotADirectoryError) as error:
        raise _invalid(archive, f"{member.name!r} comes twice") from error
    digest = blake3()
    with os.fdopen(descriptor, "wb") as out:
        while data := content.read(_PIECE):
            digest.update(data)
            out.write(data)
        out.flush()
        reach("file.sync")
        os.fsync(out.fileno())
    return digest.hexdigest()


def _read_json(archive: Path, content: IO[bytes]) -> dict[str, Any]:
    try:
        value = json.loads(content.read(_MOST_DIGESTS))
    except ValueError as error:
        raise _invalid(archive, "it is damaged") from error
    if not isinstance(value, dict):
        raise _invalid(archive, "it is damaged")
    return value


def _invalid(archive: Path, what: str) -> FsllmError:
    return FsllmError("BACKUP_INVALID", f"{archive}: {what}")
