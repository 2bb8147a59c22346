"""The layout of the server's state folder as a whole, besides the database's own schema.

    1   fsllm 0.1.0: no file ``layout``; uploads are removed at the commit of their round
    2   the file ``layout`` holds the number; uploads outlive the commit, and rounds have manifests

A change by which an older fsllm would misread the folder raises the number and adds a step.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from fsllm_common.errors import FsllmError
from fsllm_common.layout import Layout

RESTORING: Final = "restoring"
"""In a folder into which a back-up is being restored, until all of it is there."""


def _keep_uploads(root: Path) -> None:
    """From 1 to 2: nothing moves. What 0.1.0 has committed has neither uploads nor recorded manifests."""


LAYOUT: Final = Layout(newest=2, steps={1: _keep_uploads}, begun="federation")


def refuse_unfinished(root: Path) -> None:
    """Refuse a folder that was not restored to the end.

    Raises:
        FsllmError: STATE_CORRUPT.

    """
    if (root / RESTORING).exists():
        raise FsllmError(
            "STATE_CORRUPT",
            f"state folder {root}: a restoration into it was cut off",
            cure="Empty the folder and run `fsllm-server restore` again.",
        )
