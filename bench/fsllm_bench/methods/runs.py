"""One federation for many runs: the server, seven sites, an examiner and the keeper of the trusted rows."""

from __future__ import annotations

import fcntl
import itertools
import json
import shutil
import statistics
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final
from uuid import uuid4

from fsllm.v1.control_pb2 import RUN_STATUS_DONE, CancelRunRequest, SubmitRunRequest
from fsllm_bench.federation import Federation, served
from fsllm_bench.methods import splits
from fsllm_bench.methods.plans import Cell, algorithms, digest, make_plan, trusting
from fsllm_common.plan import plan_from_json

if TYPE_CHECKING:
    from fsllm.v1.control_pb2 import Commit, Run
    from fsllm.v1.federation_pb2 import Version

LIAR: Final = "hospital-e"
"""Lies in the runs whose name says so, and is as honest as the others in all other ones."""
EXAMINER: Final = "examiner"
ROOT: Final = "root"

_TURN: Final = 10
"""Runs."""


@dataclass(frozen=True, slots=True)
class Score:
    """What was measured on some rows, of the first version and of the last."""

    before: float
    after: float
    matches: float | None = None
    """Share of the answers that are right after the last round, 0 to 1; for dpo, of pairs in the right order."""


@dataclass(frozen=True, slots=True)
class Measured:
    """What came of a run; scores are None where nobody could measure them."""

    method: str
    split: str
    seed: int
    attack: str
    plan: str
    """The plan's digest."""
    failure: str = ""
    """Why it did not end."""
    held_out: Score | None = None
    """The examiner's."""
    own: Score | None = None
    """The sites', each on rows of its own that it does not train on."""
    honest: Score | None = None
    """The same without the site that lies in other runs."""
    up: float = 0.0
    """Bytes that a site sends in a round, on average."""
    down: float = 0.0
    """Bytes that a site fetches in a round, on average: the parts of a version that were not in the one before."""
    peak_mebibytes: float = 0.0
    """The server's peak of resident memory during the run."""
    train_seconds: float = 0.0
    """A site's, for the local training of a round, on average."""
    seconds: float = 0.0
    """The whole run's."""

    @property
    def cell(self) -> Cell:
        """Which run it is of."""
        return Cell(self.method, self.split, self.seed, self.attack)


def begin(cell: Cell, **values: object) -> Measured:
    """Return a result of this run and of its plan as it is now."""
    return Measured(*cell, digest(cell), **values)  # type: ignore[arg-type]  # by name


@dataclass(slots=True)
class Results:
    """A file of results, one JSON object a line; a later one of the same run and plan replaces an earlier one."""

    path: Path
    found: dict[Cell, Measured] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Read what is there; results of plans that have changed since are left out."""
        for line in self.path.read_text().splitlines() if self.path.exists() else ():
            values = json.loads(line)
            scores = {name: Score(**values[name]) for name in ("held_out", "own", "honest") if values[name]}
            self._take(Measured(**{**values, **scores}))

    def add(self, measured: Measured) -> None:
        """Append a result."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(asdict(measured)) + "\n")
        self._take(measured)

    def missing(self, cells: Iterable[Cell]) -> list[Cell]:
        """Return the runs without a result; those that have failed are tried again."""
        return [cell for cell in cells if (found := self.found.get(cell)) is None or found.failure]

    def _take(self, measured: Measured) -> None:
        try:
            current = digest(measured.cell)
        except KeyError:  # a method of another time
            return
        if measured.plan == current:
            self.found[measured.cell] = measured


@contextmanager
def members(folder: Path, split: str, seed: int) -> Iterator[Federation]:
    """Start everybody, in a folder that keeps the logs; what an earlier start has left in it is removed."""
    shutil.rmtree(folder, ignore_errors=True)
    files = splits.write(folder / "data", split, seed)
    lie = [sys.executable, "-m", "fsllm_bench.methods.attacks"]
    trusted = trusting()
    others = [name for name in algorithms() if name not in trusted]
    with served(folder) as here:
        for name, rows in files.sites.items():
            here.start_site(name, rows, "--trainer-threads", "1", program=lie if name == LIAR else ())
        # A method with trusted updates has every evaluator train: then the examiner stays away, who must not.
        examiner = f"[accept]\nalgorithms = {json.dumps(others)}\n"
        here.start_site(EXAMINER, files.held_out, "--trainer-threads", "1", role="evaluator", policy=examiner)
        root = f"[accept]\nalgorithms = {json.dumps(trusted)}\n[data]\nevaluate = false\n"
        here.start_site(ROOT, files.root, "--trainer-threads", "1", role="evaluator", policy=root)
        yield here


def measure(here: Federation, cell: Cell) -> Measured:
    """Do a run, and return what was measured; a run that can not go on is cancelled and has a ``failure``."""
    asked = json.dumps(make_plan(cell)).encode()
    plan = plan_from_json(asked)
    # From now on the kernel counts the server's peak anew.
    Path(f"/proc/{here.pid}/clear_refs").write_text("5")
    began = time.monotonic()
    failure = ""
    with here.connection() as connection:
        request = SubmitRunRequest(plan=asked, request_id=uuid4().hex)
        run_id = connection.call(connection.control.SubmitRun, request).run.run_id
        for event in connection.watch(run_id):
            declines = event.subject in (plan.cohort.sites or ()) and " declines: " in event.message
            if not failure and (declines or (event.kind, event.subject) == ("status", "paused")):
                failure = event.message
                connection.call(connection.control.CancelRun, CancelRunRequest(run_id=run_id))
        run = connection.run(run_id)
    here.daemons.check()
    if run.status != RUN_STATUS_DONE:
        return begin(cell, failure=failure or run.message or "cancelled")
    return read(cell, run, here.server_peak(), time.monotonic() - began)


def read(cell: Cell, run: Run, peak: float, seconds: float) -> Measured:
    """Return what a run that is done tells."""
    rounds = run.commits[1:]
    updates = [update for commit in rounds for update in commit.contributions if update.member != ROOT]
    trained = [metric.value for update in updates for metric in update.metrics if metric.name == "seconds"]
    sites = {update.member for update in updates}
    return begin(
        cell,
        held_out=_score(run, {EXAMINER}),
        own=_score(run, sites),
        honest=_score(run, sites - {LIAR}),
        up=statistics.mean(update.payload_bytes for update in updates),
        down=statistics.mean(_fetched(*pair) for pair in itertools.pairwise(run.commits)),
        peak_mebibytes=peak,
        train_seconds=sum(trained) / len(updates),
        seconds=seconds,
    )


def _score(run: Run, members: set[str]) -> Score | None:
    first, last = (
        {name: _mean(commit, members, name) for name in ("loss", "exact_match", "reward_accuracy")}
        for commit in (run.commits[0], run.commits[-1])
    )
    before, after = first["loss"], last["loss"]
    if before is None or after is None:
        return None
    matches = last["exact_match"] if last["exact_match"] is not None else last["reward_accuracy"]
    return Score(before, after, matches)


def _mean(commit: Commit, members: set[str], name: str) -> float | None:
    """Return the mean over all rows of these members."""
    found = [
        metric
        for measured in commit.metrics
        if measured.member in members
        for metric in measured.metrics
        if metric.name == name
    ]
    weight = sum(metric.weight for metric in found)
    return sum(metric.value * metric.weight for metric in found) / weight if weight else None


def _fetched(before: Commit, after: Commit) -> int:
    held = _parts(before.version)
    return sum(size for digest, size in _parts(after.version).items() if digest not in held)


def _parts(version: Version) -> dict[bytes, int]:
    return {part.digest: part.payload_bytes for part in version.parts} or {version.digest: version.payload_bytes}


def by_turns(cells: Iterable[Cell], lock: Path | None) -> Iterator[Cell]:
    """Yield the runs, and hold a file's lock during every few of them, for machines on which others measure, too."""
    left = list(cells)
    while left:
        some, left = left[:_TURN], left[_TURN:]
        if lock is None:
            yield from some
            continue
        with lock.open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield from some
