"""What the store's durable files have in common beyond ``fsllm_common.files``."""

import os
from pathlib import Path

from fsllm_common.errors import Unavailable
from fsllm_common.files import sync_folder


def make_folder(folder: Path) -> None:
    """Make ``folder`` (0700) and its missing parents so that they survive a power loss."""
    missing = []
    while not folder.is_dir():
        missing.append(folder)
        folder = folder.parent
    for path in reversed(missing):
        path.mkdir(mode=0o700, exist_ok=True)
        sync_folder(path.parent)


def demand_space(folder: Path, size: int) -> None:
    """Refuse work of ``size`` bytes that is bound to fail.

    Raises:
        Unavailable: DISK_FULL.

    """
    status = os.statvfs(folder)
    free = status.f_bavail * status.f_frsize
    if size > free:
        raise Unavailable(
            "DISK_FULL", f"No space left for {folder}: {size} bytes needed, {free} free", retry_after=30.0
        )


def write_all(descriptor: int, data: memoryview, offset: int) -> None:
    """Write all of ``data`` at ``offset``: pwrite alone may write less, e.g. just before the disk is full."""
    while data:
        written = os.pwrite(descriptor, data, offset)
        data = data[written:]
        offset += written
