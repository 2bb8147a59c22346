"""What the store's durable files have in common beyond ``fsllm_common.files``."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fsllm_common.errors import Unavailable


def demand_space(folder: Path, size: int) -> None:
    """Refuse work of ``size`` bytes that is bound to fail.

    Raises:
        Unavailable: DISK_FULL.

    """
    status = os.statvfs(folder)
    free = status.f_bavail * status.f_frsize
    if size > free:
        raise Unavailable("DISK_FULL", f"No space left for {folder}: {size} bytes needed, {free} free", retry_after=5.0)


@contextmanager
def exclusive(path: Path) -> Iterator[bool]:
    """Lock a file, made when missing, against every other holder; yields False when there is one already."""
    with _open_lock(path) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


@contextmanager
def shared(path: Path) -> Iterator[None]:
    """Lock a file, made when missing, against ``exclusive`` holders; waits until there is none."""
    with _open_lock(path) as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        yield


@contextmanager
def _open_lock(path: Path) -> Iterator[int]:
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        yield file
    finally:
        os.close(file)  # which unlocks it
