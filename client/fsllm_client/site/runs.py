"""What the site knows of each run: its plan, and whether a person has accepted it."""

import json
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, Literal

from fsllm_client.site.state import DIRECTORY_MODE, FILE_MODE
from fsllm_common.errors import FsllmError, Refused
from fsllm_common.files import write_atomic
from fsllm_common.plan import Plan

Standing = Literal["waiting", "accepted", "joined", "declined"]

_RECORD: Final = "run.json"
_PLAN: Final = "plan.json"
_ACCEPTED: Final = "accepted"


@dataclass(frozen=True, slots=True)
class SiteRun:
    """A run as the site sees it."""

    run_id: str
    name: str
    standing: Standing
    """waiting: for a person's acceptance."""
    message: str
    since: str
    """UTC, ISO 8601."""


class RunBook:
    """The folder of runs. The daemon writes; ``accept`` may be called by another process."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def note(self, run_id: str, plan: Plan, standing: Standing, message: str = "") -> None:
        """Record how the site stands to a run.

        Raises:
            Unavailable: DISK_FULL.

        """
        folder = self._folder(run_id)
        folder.mkdir(mode=DIRECTORY_MODE, parents=True, exist_ok=True)
        run = SiteRun(run_id, plan.name, standing, message, datetime.now(UTC).isoformat(timespec="seconds"))
        write_atomic(folder / _PLAN, plan.model_dump_json(indent=2).encode(), mode=FILE_MODE)
        write_atomic(folder / _RECORD, json.dumps(asdict(run), indent=2).encode(), mode=FILE_MODE)

    def all(self) -> list[SiteRun]:
        """Return every run, the oldest first.

        Raises:
            FsllmError: STATE_CORRUPT.

        """
        runs = [_read(path) for path in self.root.glob(f"*/{_RECORD}")]
        return sorted(runs, key=lambda run: (run.since, run.run_id))

    def plan(self, run_id: str) -> Path:
        """Return the file that holds a run's plan."""
        return self._folder(run_id) / _PLAN

    def is_accepted(self, run_id: str) -> bool:
        """Return whether a person here has accepted the run."""
        return (self._folder(run_id) / _ACCEPTED).is_file()

    def accept(self, run: str) -> SiteRun:
        """Accept a run, named by its id, the beginning of it, or its name.

        Raises:
            Refused: RUN_UNKNOWN: none or several fit.

        """
        found = self.find(run, rather="waiting")
        write_atomic(self._folder(found.run_id) / _ACCEPTED, b"", mode=FILE_MODE)
        return found

    def find(self, run: str, *, rather: str = "") -> SiteRun:
        """Return the run of this id, of an id that begins so, or of this name.

        Args:
            run: What it is named by.
            rather: The standing of the one that is meant where several fit.

        Raises:
            Refused: RUN_UNKNOWN: none or several fit.

        """
        fitting = [known for known in self.all() if known.run_id.startswith(run)]
        fitting = fitting or [known for known in self.all() if known.name == run]
        meant = [known for known in fitting if known.standing == rather]
        if len(meant) == 1:
            fitting = meant
        if len(fitting) != 1:
            what = "No run" if not fitting else f"More than one run ({', '.join(r.run_id for r in fitting)})"
            raise Refused(
                "RUN_UNKNOWN", f"{what} fits {run!r}", cure="`fsllm-client runs` shows the runs offered here."
            )
        return fitting[0]

    def _folder(self, run_id: str) -> Path:
        """Return a run's folder. A run id is the server's word: it must not lead elsewhere."""
        if not run_id or len(run_id) > 128 or not all(c.isascii() and (c.isalnum() or c in "-_") for c in run_id):
            raise Refused("RUN_UNKNOWN", f"{run_id[:40]!r} is no run id")
        return self.root / run_id


def _read(path: Path) -> SiteRun:
    try:
        raw = json.loads(path.read_bytes())
        return SiteRun(**{field.name: raw[field.name] for field in fields(SiteRun)})
    except (ValueError, KeyError, TypeError) as error:
        raise FsllmError("STATE_CORRUPT", f"{path} is no record of a run") from error
