"""What a restoration from a back-up leaves for the next start: it must be told to every run that is under way."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from fsllm_common.errors import FsllmError
from fsllm_common.files import sync_folder, write_atomic

RESTORED: Final = "restored.json"
"""In the state folder, until the runs' logs say so themselves."""


@dataclass(frozen=True, slots=True)
class Restoration:
    """One restoration."""

    epoch: str
    """Its name: random, so that two restorations of the same back-up can be told apart."""
    made: str
    """When the back-up was made; ISO 8601, UTC."""

    def save(self, path: Path) -> None:
        """Leave the note."""
        write_atomic(path, json.dumps(asdict(self)).encode() + b"\n", mode=0o600)

    @classmethod
    def load(cls, path: Path) -> Restoration | None:
        """Return the note, if there is one.

        Raises:
            FsllmError: STATE_CORRUPT.

        """
        try:
            said = json.loads(path.read_bytes())
            return cls(str(said["epoch"]), str(said["made"]))
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError) as error:
            raise FsllmError("STATE_CORRUPT", f"{path} can not be read") from error


def forget(path: Path) -> None:
    """Remove the note, durably."""
    path.unlink(missing_ok=True)
    sync_folder(path.parent)
