"""Uploads on disk, from their first chunk until their round is committed.

``spools/<run>/<round>/<member>/<digest>``, and ``<digest>.manifest`` beside it once verified. The name says what the
bytes are going to be, so that a transfer that broke goes on where it stood, after a restart of either end too. The
file's length is the committed offset; whether the bytes are right is judged once, at the end, by the digest. Nothing
is acknowledged before ``verify`` has synced the file.
"""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fsllm.v1.tensors_pb2 import Manifest
from fsllm_common.errors import FsllmError, UpdateRejected
from fsllm_common.failpoints import reach
from fsllm_common.files import disk_errors, write_atomic
from fsllm_server.store.blobs import StoredVersion
from fsllm_server.store.files import demand_space, make_folder, write_all


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
        self._superseded = False
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

    def write(self, offset: int, data: memoryview) -> None:
        """Take the next bytes of the payload.

        Raises:
            FsllmError: OFFSET_OUT_OF_RANGE when they do not begin at ``offset`` or pass the end, NOT_WANTED when
                another stream of the same member has taken over, DISK_FULL.

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

    async def verify(self, manifest: Manifest, *, max_norm: float | None) -> VerifiedSpool:
        """Sync the file, and check digest, finiteness and norm, off the event loop. Closes the spool.

        Args:
            manifest: What the upload announced; validated.
            max_norm: The largest L2 norm over all tensors; None: any finite one.

        Raises:
            UpdateRejected: DIGEST_MISMATCH, NOT_FINITE, NORM_TOO_LARGE; the spool is dropped then.
            FsllmError: OFFSET_OUT_OF_RANGE when bytes are missing, NOT_WANTED when another stream has
                taken over, DISK_FULL.

        """
        self._demand_current()
        if self.offset != self.size:
            raise FsllmError("OFFSET_OUT_OF_RANGE", f"The upload ends after {self.offset} of {self.size} bytes")
        # The disk works while the processor checks.
        sync = asyncio.create_task(asyncio.to_thread(self._sync, manifest))
        try:
            norm = await asyncio.to_thread(_check, self.path, manifest, max_norm)
        except UpdateRejected:
            self.path.unlink(missing_ok=True)
            raise
        finally:
            await sync
            self.close()
        return VerifiedSpool(manifest, self.path, norm)

    def close(self) -> None:
        """Let the file go; what it holds stays for the next attempt. May be called twice."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def supersede(self) -> None:
        """Stop taking bytes: another stream of the same member continues this upload."""
        self._superseded = True

    def _demand_current(self) -> None:
        if self._superseded:
            raise FsllmError("NOT_WANTED", "Another stream of this site has taken this upload over")

    def _sync(self, manifest: Manifest) -> None:
        """Make payload, manifest and their names durable."""
        with disk_errors(self.path.parent):
            reach("spool.sync")
            os.fdatasync(self._file)
            reach("spool.synced")
            write_atomic(self.path.with_suffix(".manifest"), manifest.SerializeToString(), mode=0o600)


class Spools:
    """All uploads that the server holds."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open: dict[Path, Spool] = {}
        make_folder(folder)

    def open(self, run: str, round: int, member: str, manifest: Manifest) -> Spool:  # noqa: A002 - the domain's word
        """Return the spool for an upload, at the offset it has reached.

        A member has one upload a round: a partial one of another digest makes way, and an open one of this digest stops
        taking bytes. The caller has made sure that none is recorded yet (``Engine.expect_upload``).

        Raises:
            FsllmError: DISK_FULL.

        """
        folder = self._folder(run, round, member)
        if (open_already := self._open.get(folder)) is not None:
            open_already.supersede()
        spool = self._open[folder] = Spool(folder, manifest)
        return spool

    def offset(self, run: str, round: int, member: str, digest: bytes) -> int:  # noqa: A002
        """Return how many bytes of this upload are held."""
        try:
            return (self._folder(run, round, member) / digest.hex()).stat().st_size
        except FileNotFoundError:
            return 0

    def recorded(self, run: str, round: int, member: str, digest: bytes) -> StoredVersion:  # noqa: A002
        """Return a verified upload.

        Raises:
            FsllmError: STATE_CORRUPT: it is not there.

        """
        path = self._folder(run, round, member) / digest.hex()
        try:
            manifest = Manifest.FromString(path.with_suffix(".manifest").read_bytes())
        except FileNotFoundError:
            raise FsllmError("STATE_CORRUPT", f"{path}: this recorded upload is missing") from None
        return StoredVersion(manifest, path)

    async def drop(self, run: str, round: int | None = None) -> None:  # noqa: A002
        """Remove a round's uploads, or a whole run's."""
        folder = self.folder / run if round is None else self.folder / run / str(round)
        for member in [path for path in self._open if path.is_relative_to(folder)]:
            self._open.pop(member).supersede()
        await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)

    async def sweep(self, wanted: Callable[[str, int], bool]) -> None:
        """Remove the uploads of every (run, round) that ``wanted`` does not know: what a crash left behind."""
        for run in list(self.folder.iterdir()):
            rounds = [int(folder.name) for folder in run.iterdir()]
            for round_ in rounds:
                if not wanted(run.name, round_):
                    await self.drop(run.name, round_)

    def _folder(self, run: str, round: int, member: str) -> Path:  # noqa: A002
        return self.folder / run / str(round) / member


def _check(path: Path, manifest: Manifest, max_norm: float | None) -> float:
    """Return the norm of a payload that passes; raise UpdateRejected for one that does not."""
    # Here, because numpy would be a third of an idle server's memory.
    from fsllm_server.reduce.check import check_payload

    return check_payload(path, manifest, max_norm)
