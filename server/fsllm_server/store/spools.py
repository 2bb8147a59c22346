"""Uploads on disk, from their first chunk until their round is committed, and as long after as retention says.

``spools/<run>/<round>/<member>/<digest>``, and ``<digest>.manifest`` beside it once verified. The name says what the
bytes are going to be, so that a transfer that broke goes on where it stood, after a restart of either end too. The
file's length is the committed offset; whether the bytes are right is judged once, at the end, by the digest. Nothing
is acknowledged before ``verify`` has synced the file.

What is not wanted any more is renamed to ``spools/.dropped-<random>`` and then removed: so a round's uploads, or one
member's, are gone all at once, and what a crash leaves of them is swept away by the next start.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
from collections import Counter
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from fsllm.v1.tensors_pb2 import Manifest
from fsllm_common.errors import FsllmError, UpdateRejected
from fsllm_common.failpoints import reach
from fsllm_common.files import disk_errors, make_folder, write_all, write_atomic, write_behind
from fsllm_server.store.blobs import StoredVersion
from fsllm_server.store.files import demand_space, exclusive

if TYPE_CHECKING:
    from fsllm_server.reduce.check import PayloadCheck

_DROPPED: Final = ".dropped-"

KEEP: Final = ".keep"
"""In the folder. Whoever holds a shared lock on this file (a back-up) keeps everything from being removed."""


@dataclass(frozen=True, slots=True)
class VerifiedSpool:
    """A complete upload: durable, equal to its digest, finite, and within the plan's norm."""

    manifest: Manifest
    payload: Path
    norm: float


class Spool:
    """One upload in progress. ``offset`` bytes are held."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        """Open or make the file; use ``Spools.open``."""
        self.path = folder / manifest.digest.hex()
        self.size: int = manifest.payload_bytes
        self._over = ""
        with disk_errors(folder):
            make_folder(folder)
            for other in folder.iterdir():
                if other.stem != self.path.name:
                    other.unlink()
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            held = os.fstat(self._file).st_size
            if held > self.size:  # not ours: no upload of this digest writes past its end
                os.ftruncate(self._file, 0)
                held = 0
            try:
                demand_space(folder, self.size - held)
            except FsllmError:
                self.close()
                raise
        self.offset: int = held
        # What arrives in one go is checked as it comes, while it is in the processor's cache.
        self._check = _begin_check(manifest) if held == 0 else None

    def write(self, offset: int, data: memoryview) -> None:
        """Take the next bytes of the payload.

        Raises:
            FsllmError: OFFSET_OUT_OF_RANGE when they do not begin at ``offset`` or pass the end, NOT_WANTED when
                another stream of the same member has taken over or the upload was dropped, DISK_FULL.

        """
        self._demand_current()
        if offset != self.offset or offset + len(data) > self.size:
            raise FsllmError(
                "OFFSET_OUT_OF_RANGE",
                f"A chunk of {len(data)} bytes at {offset} does not follow the {self.offset} of {self.size} bytes held",
            )
        with disk_errors(self.path.parent):
            write_all(self._file, data, offset)
            self.offset += len(data)
            write_behind(self._file, self.offset)
        if self._check is not None:
            self._check.update(data)

    async def verify(self, manifest: Manifest, *, max_norm: float | None) -> VerifiedSpool:
        """Sync the file, and check digest, finiteness and norm, off the event loop. Closes the spool.

        Args:
            manifest: What the upload announced; validated.
            max_norm: The largest L2 norm over all tensors; None: any finite one.

        Raises:
            UpdateRejected: DIGEST_MISMATCH, NOT_FINITE, NORM_TOO_LARGE; the spool is dropped then.
            FsllmError: OFFSET_OUT_OF_RANGE when bytes are missing, NOT_WANTED when another stream has
                taken over or the upload was dropped, DISK_FULL.

        """
        self._demand_current()
        if self.offset != self.size:
            raise FsllmError("OFFSET_OUT_OF_RANGE", f"The upload ends after {self.offset} of {self.size} bytes")
        try:
            return await self._verified(manifest, max_norm)
        except FileNotFoundError:
            self._demand_current()  # it was dropped with its folder meanwhile
            raise
        finally:
            self.close()

    async def _verified(self, manifest: Manifest, max_norm: float | None) -> VerifiedSpool:
        # The disk works while the processor checks.
        sync = asyncio.create_task(asyncio.to_thread(self._sync, manifest))
        try:
            norm = await asyncio.to_thread(self._checked, manifest, max_norm)
        except UpdateRejected:
            self.path.unlink(missing_ok=True)
            raise
        finally:
            await sync
        return VerifiedSpool(manifest, self.path, norm)

    def close(self) -> None:
        """Let the file go; what it holds stays for the next attempt. May be called twice."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def abandon(self, why: str) -> None:
        """Take no more bytes, and tell whoever sends them why."""
        self._over = why

    def _demand_current(self) -> None:
        if self._over:
            raise FsllmError("NOT_WANTED", self._over)

    def _checked(self, manifest: Manifest, max_norm: float | None) -> float:
        """Return the norm of a payload that passes; raise UpdateRejected for one that does not."""
        check = self._check
        if check is None:
            check = _begin_check(manifest)
            check.read(self.path)
        return check.finish(self.path, max_norm)

    def _sync(self, manifest: Manifest) -> None:
        """Make payload, manifest and their names durable."""
        try:
            with disk_errors(self.path.parent):
                reach("spool.sync")
                os.fdatasync(self._file)
                reach("spool.synced")
                write_atomic(self.path.with_suffix(".manifest"), manifest.SerializeToString(), mode=0o600)
        except (FsllmError, OSError):
            # The kernel may have dropped what it could not write, and a second sync would succeed all the same: what
            # is not known to be on the disk is sent again.
            self.path.unlink(missing_ok=True)
            raise


class Spools:
    """All uploads that the server holds."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open: dict[Path, Spool] = {}
        self._pinned: Counter[Path] = Counter()
        self.on_full: Callable[[], None] = lambda: None
        """Called when there is no room for an upload."""
        make_folder(folder)
        for left in folder.glob(f"{_DROPPED}*"):
            shutil.rmtree(left)

    def open(self, run: str, round: int, member: str, manifest: Manifest) -> Spool:  # noqa: A002 - the domain's word
        """Return the spool for an upload, at the offset it has reached.

        A member has one upload a round: a partial one of another digest makes way, and an open one of this digest stops
        taking bytes. The caller has made sure that none is recorded yet (``Engine.expect_upload``).

        Raises:
            FsllmError: DISK_FULL.

        """
        folder = self._folder(run, round, member)
        if (open_already := self._open.get(folder)) is not None:
            open_already.abandon("Another stream of this site has taken this upload over")
        try:
            spool = self._open[folder] = Spool(folder, manifest)
        except FsllmError as error:
            if error.reason == "DISK_FULL":
                self.on_full()
            raise
        return spool

    def runs(self) -> list[str]:
        """Return the runs that uploads are held of, sorted."""
        return sorted(path.name for path in _folders(self.folder))

    def offset(self, run: str, round: int, member: str, digest: bytes) -> int:  # noqa: A002
        """Return how many bytes of this upload are held."""
        try:
            return self.path(run, round, member, digest).stat().st_size
        except FileNotFoundError:
            return 0

    def path(self, run: str, round: int, member: str, digest: bytes) -> Path:  # noqa: A002
        """Return where an upload's payload lies, if it does."""
        return self._folder(run, round, member) / digest.hex()

    def recorded(self, run: str, round: int, member: str, digest: bytes) -> StoredVersion:  # noqa: A002
        """Return a verified upload.

        Raises:
            FsllmError: STATE_CORRUPT: it is not there.

        """
        path = self.path(run, round, member, digest)
        try:
            manifest = Manifest.FromString(path.with_suffix(".manifest").read_bytes())
        except FileNotFoundError:
            raise FsllmError("STATE_CORRUPT", f"{path}: this recorded upload is missing") from None
        return StoredVersion(manifest, path)

    @contextmanager
    def pinned(self, run: str, round: int) -> Iterator[None]:  # noqa: A002
        """Keep a round's uploads from being removed for the length of the block."""
        folder = self.folder / run / str(round)
        self._pinned[folder] += 1
        try:
            yield
        finally:
            self._pinned[folder] -= 1
            self._pinned += Counter()  # without zeros

    async def sweep(self, keeps: Callable[[str, int], Container[str]], run: str | None = None) -> int:
        """Remove what is not to be kept, and return how many folders that were.

        Safe to repeat, and after a crash at any instant.

        Nothing is removed while a back-up is being made.

        Args:
            keeps: (run, round) -> the members whose uploads stay.
            run: Only this run's; None: all, those that nobody knows any more included.

        """
        with exclusive(self.folder / KEEP) as alone:
            dropped = [self._drop(path) for path in self._unwanted(keeps, run)] if alone else []
        for path in dropped:
            await asyncio.to_thread(shutil.rmtree, path, ignore_errors=True)
        return len(dropped)

    def _unwanted(self, keeps: Callable[[str, int], Container[str]], run: str | None) -> Iterator[Path]:
        """Yield the folders to remove: of runs, rounds or members."""
        runs = [self.folder / run] if run is not None else _folders(self.folder)
        for run_folder in runs:
            rounds = _folders(run_folder)
            for folder in rounds:
                kept = keeps(run_folder.name, int(folder.name))
                members = _folders(folder)
                unwanted = [member for member in members if member.name not in kept]
                if folder in self._pinned:
                    continue
                if len(unwanted) == len(members):
                    yield folder
                else:
                    yield from unwanted

    def _drop(self, folder: Path) -> Path:
        """Make a folder disappear at once, and return where it waits for its removal."""
        for member in [path for path in self._open if path.is_relative_to(folder)]:
            self._open.pop(member).abandon("The run has gone on, or ended, without this upload")
        dropped = self.folder / f"{_DROPPED}{secrets.token_hex(8)}"
        reach("spool.drop")
        folder.rename(dropped)
        reach("spool.dropped")
        with suppress(OSError):  # it holds other rounds
            folder.parent.rmdir()
        return dropped

    def _folder(self, run: str, round: int, member: str) -> Path:  # noqa: A002
        return member_folder(self.folder, run, round, member)


def member_folder(spools: Path, run: str, round: int, member: str) -> Path:  # noqa: A002
    """Return where a member's uploads for a round lie."""
    return spools / run / str(round) / member


def _folders(parent: Path) -> list[Path]:
    """Return the folders in ``parent``, but those whose names begin with a dot; none when it does not exist."""
    try:
        return [path for path in parent.iterdir() if path.is_dir() and not path.name.startswith(".")]
    except FileNotFoundError:
        return []


def _begin_check(manifest: Manifest) -> PayloadCheck:
    # Here, because numpy would be a third of an idle server's memory.
    from fsllm_server.reduce.check import PayloadCheck

    return PayloadCheck(manifest)
