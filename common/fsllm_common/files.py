"""Files that are either wholly there or not at all, and full disks that say so."""

import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from fsllm_common.errors import Unavailable
from fsllm_common.failpoints import reach


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turn 'no space left', 'quota exceeded' and I/O errors into errors that name ``folder``; other OSErrors pass.

    Raises:
        Unavailable: DISK_FULL, DISK_FAILED.

    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise Unavailable("DISK_FULL", f"No space left for {folder}", retry_after=5.0) from error
        if error.errno == errno.EIO:
            raise Unavailable("DISK_FAILED", f"The disk under {folder} fails: {error}", retry_after=5.0) from error
        raise


def write_all(descriptor: int, data: memoryview, offset: int) -> None:
    """Write all of ``data`` at ``offset``: pwrite alone may write less, e.g. just before the disk is full."""
    while data:
        written = os.pwrite(descriptor, data, offset)
        data = data[written:]
        offset += written


_STRIDE: Final = 4 << 20


def write_behind(descriptor: int, end: int) -> None:
    """Let the disk begin on what was just written up to ``end``, so that the sync at the end has little left to do.

    Call it after each write of a file that is written in order, in pieces that divide 4 MiB. On Linux, advising that
    pages are not needed starts to write those that are dirty, and drops only those that are not.
    """
    if end % _STRIDE == 0:
        os.posix_fadvise(descriptor, end - _STRIDE, _STRIDE, os.POSIX_FADV_DONTNEED)


def sync_folder(folder: Path) -> None:
    """Make renames and removals in ``folder`` survive a power loss.

    Raises:
        Unavailable: DISK_FULL, DISK_FAILED.

    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with disk_errors(folder):
            reach("folder.sync")
            os.fsync(descriptor)
        reach("folder.synced")
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> None:
    """Make ``folder`` (0700) and its missing parents so that they survive a power loss.

    Raises:
        Unavailable: DISK_FULL, DISK_FAILED.

    """
    missing = []
    while not folder.is_dir():
        missing.append(folder)
        folder = folder.parent
    # The deepest that exists may have been made by a process that was killed before it synced the name.
    with suppress(PermissionError):  # a parent that is not ours to read is not ours to sync
        sync_folder(folder.parent)
    for path in reversed(missing):
        with disk_errors(path.parent):
            path.mkdir(mode=0o700, exist_ok=True)
        sync_folder(path.parent)


@contextmanager
def replacing(path: Path, *, mode: int = 0o644, durable: bool = True) -> Iterator[Path]:
    """Yield a new path beside ``path`` to write to; on success it is synced and takes the place of ``path`` at once.

    The file is created with ``mode`` before anything is written, so that a secret is at no time readable by others. On
    an error nothing has changed.

    Args:
        path: The file.
        mode: Its permissions.
        durable: False for a file that nobody looks for after a crash: it is whole for its readers, and not synced.

    Raises:
        Unavailable: DISK_FULL.

    """
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.{secrets.token_hex(4)}.new")
    with disk_errors(path.parent):
        try:
            os.close(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode))
            yield fresh
            descriptor = os.open(fresh, os.O_RDONLY)
            try:
                os.fchmod(descriptor, mode)
                if durable:
                    reach("file.sync")
                    os.fsync(descriptor)
            finally:
                os.close(descriptor)
            reach("file.rename")
            fresh.replace(path)
            reach("file.renamed")
        except BaseException:
            with suppress(FileNotFoundError):
                fresh.unlink()
            raise
        if durable:
            sync_folder(path.parent)


def write_atomic(path: Path, data: bytes, *, mode: int = 0o644) -> None:
    """Write ``data`` to ``path`` so that a crash at any instant leaves the old content or the new, never a mix.

    Raises:
        Unavailable: DISK_FULL.

    """
    with replacing(path, mode=mode) as fresh:
        fresh.write_bytes(data)
