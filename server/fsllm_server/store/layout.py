"""The layout of a state folder as a whole, besides the database's own schema: its version, and the steps between two.

    1   fsllm 0.1.0: no file ``layout``; uploads are removed at the commit of their round
    2   the file ``layout`` holds the number; uploads outlive the commit, and rounds have manifests

A change by which an older fsllm would misread the folder raises the number and adds a step to ``STEPS``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from fsllm_common.errors import FsllmError
from fsllm_common.files import write_atomic

LAYOUT: Final = 2
"""The one that this version of fsllm works with."""

FILE: Final = "layout"

RESTORING: Final = "restoring"
"""In a folder into which a back-up is being restored, until all of it is there."""


def _keep_uploads(root: Path) -> None:
    """From 1 to 2: nothing moves. What 0.1.0 has committed has neither uploads nor recorded manifests."""


STEPS: Final[Mapping[int, Callable[[Path], None]]] = {1: _keep_uploads}
"""By the layout that they start from. Each may be repeated: a crash comes between it and the new number."""


def layout_of(root: Path) -> int | None:
    """Return a folder's layout; None when there is nothing in it yet.

    Raises:
        FsllmError: STATE_CORRUPT: its number is none, or a restoration was cut off.

    """
    if (root / RESTORING).exists():
        raise FsllmError(
            "STATE_CORRUPT",
            f"state folder {root}: a restoration into it was cut off",
            cure="Empty the folder and run `fsllm-server restore` again.",
        )
    try:
        text = (root / FILE).read_text(encoding="ascii", errors="replace").strip()
    except FileNotFoundError:
        return 1 if (root / "federation").exists() else None
    if not text.isascii() or not text.isdecimal():
        raise FsllmError("STATE_CORRUPT", f"state folder {root}: {FILE} holds {text[:20]!r}, which is no number")
    return int(text)


def demand_known(layout: int, where: str) -> None:
    """Refuse a layout of the future.

    Raises:
        FsllmError: STATE_NEWER.

    """
    if layout > LAYOUT:
        raise FsllmError("STATE_NEWER", f"{where} has layout {layout}, newer than {LAYOUT}")


def migrate(root: Path) -> None:
    """Bring a folder to ``LAYOUT``, or begin a new one. The caller holds its lock.

    Raises:
        FsllmError: STATE_NEWER, STATE_CORRUPT, DISK_FULL.

    """
    layout = layout_of(root)
    if layout is None:
        layout = LAYOUT
    else:
        demand_known(layout, f"state folder {root}")
    for step in range(layout, LAYOUT):
        STEPS[step](root)
        write_atomic(root / FILE, f"{step + 1}\n".encode(), mode=0o600)
    if not (root / FILE).exists():
        write_atomic(root / FILE, f"{LAYOUT}\n".encode(), mode=0o600)
