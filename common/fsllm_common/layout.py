"""The layout of a daemon's state folder: its version, in the file ``layout``, and the steps from one to the next."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fsllm_common.errors import FsllmError
from fsllm_common.files import write_atomic

FILE: Final = "layout"


@dataclass(frozen=True, slots=True)
class Layout:
    """What one kind of daemon keeps in its folder."""

    newest: int
    """The one that this version of fsllm works with."""
    steps: Mapping[int, Callable[[Path], None]]
    """By the layout that they start from. Each may be repeated: a crash comes between it and the new number."""
    begun: str
    """Lies in a folder of layout 1, which may hold no number yet."""

    def of(self, root: Path) -> int | None:
        """Return a folder's layout; None when there is nothing in it yet.

        Raises:
            FsllmError: STATE_CORRUPT: its number is none.

        """
        try:
            text = (root / FILE).read_text(encoding="ascii", errors="replace").strip()
        except FileNotFoundError:
            return 1 if (root / self.begun).exists() else None
        if not text.isascii() or not text.isdecimal():
            raise FsllmError("STATE_CORRUPT", f"state folder {root}: {FILE} holds {text[:20]!r}, which is no number")
        return int(text)

    def demand_known(self, layout: int | None, where: str) -> None:
        """Refuse a layout of the future.

        Raises:
            FsllmError: STATE_NEWER.

        """
        if layout is not None and layout > self.newest:
            raise FsllmError("STATE_NEWER", f"{where} has layout {layout}, newer than {self.newest}")

    def migrate(self, root: Path) -> None:
        """Bring a folder to the newest layout, or begin a new one. The caller holds its lock.

        Raises:
            FsllmError: STATE_NEWER, STATE_CORRUPT, DISK_FULL.

        """
        layout = self.of(root)
        if layout is None:
            layout = self.newest
        else:
            self.demand_known(layout, f"state folder {root}")
        for step in range(layout, self.newest):
            self.steps[step](root)
            write_atomic(root / FILE, f"{step + 1}\n".encode(), mode=0o600)
        if not (root / FILE).exists():
            write_atomic(root / FILE, f"{self.newest}\n".encode(), mode=0o600)
