"""What must be true after the kill loop: nothing lost, nothing twice, nothing from the start again."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sysconfig
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from os import environ
from typing import Any

from tests.fault.closed_form import replay
from tests.system.harness import CALL_SECONDS, ServerProcess
from tests.system.peer import read_payload
from tests.system.site_process import SiteProcess

from fsllm.v1 import control_pb2 as control

Upload = tuple[str, int, str, str]
"""Run, round, member, and the beginning of the payload's digest."""


def lines(log: str) -> Iterator[dict[str, Any]]:
    """Yield the lines of a JSON log; a process that is killed may leave half a line."""
    for line in log.splitlines():
        try:
            found = json.loads(line)
        except ValueError:
            continue
        if isinstance(found, dict):
            yield found


@dataclass(frozen=True)
class Observed:
    """What the server held of each upload at an instant, and how long its log was a little later."""

    held: Mapping[Upload, int]
    log: int

    @classmethod
    def now(cls, server: ServerProcess) -> Observed:
        """Look at the spools."""
        held: dict[Upload, int] = {}
        for path in (server.state / "spools").glob("*/*/*/*"):
            if not path.suffix and not path.name.startswith("."):
                run, round_, member = path.parts[-4:-1]
                with suppress(FileNotFoundError):  # its round was committed just now
                    held[run, int(round_), member, path.name[:12]] = path.stat().st_size
        return cls(held, len(server.log))


def record_of(server: ServerProcess, run: str) -> dict[str, Any]:
    """Return what `fsllm run show --json` says of a run."""
    command = [f"{sysconfig.get_path('scripts')}/fsllm", "run", "show", run, "--json"]
    variables = {**environ, "FSLLM_STATE_DIR": str(server.state)}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=True, timeout=60)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def check_run(server: ServerProcess, run: Mapping[str, Any], calm: Sequence[str], *, closed_form: bool) -> list[str]:
    """Return what is wrong with a run.

    Args:
        server: That has it.
        run: Its record.
        calm: The digests of all versions of the same plan where nothing happened.
        closed_form: The noop algorithm's: what its contributions must give can be computed here.

    """
    name = f"run {run['run_id']}"
    if run["status"] != "done":
        return [f"{name} is {run['status']}: {run['message']}"]
    wrong: list[str] = []
    commits, sites = run["commits"], sorted(run["plan"]["cohort"]["sites"])
    if [commit["round"] for commit in commits] != list(range(run["rounds"] + 1)):
        wrong.append(f"{name} has committed {[commit['round'] for commit in commits]}")
    for commit in commits[1:]:
        if [one["member"] for one in commit["contributions"]] != sites:
            wrong.append(f"{name}, round {commit['round']}: not every site counts exactly once")
    if [commit["digest"] for commit in commits] != list(calm):
        wrong.append(f"{name}: its versions are not those of the undisturbed run")
    for (round_, member), times in _recorded(server, run["run_id"]).items():
        if times != 1:
            wrong.append(f"{name}, round {round_}: an update of {member} was recorded {times} times")
    with server.channel(server.operator()) as channel:
        export = channel.unary_stream(
            "/fsllm.v1.ControlService/ExportRun",
            request_serializer=control.ExportRunRequest.SerializeToString,
            response_deserializer=None,
        )
        request = control.ExportRunRequest(run_id=run["run_id"])
        manifest, payload = read_payload(export(request, timeout=CALL_SECONDS))
    if closed_form:
        version, differences = replay(run, manifest)
        wrong += [f"{name}: {difference}" for difference in differences]
        if payload != version.tobytes():
            wrong.append(f"{name}: the adapter is not the one of its acknowledged updates")
    return wrong


def _recorded(server: ServerProcess, run: str) -> Counter[tuple[int, str]]:
    """Count the updates in a run's log by round and member."""
    with sqlite3.connect(f"file:{server.state / 'fsllm.sqlite3'}?mode=ro", uri=True) as database:
        found = database.execute("SELECT body FROM events WHERE run_id = ? AND kind = 'update'", (run,))
        bodies = [json.loads(body) for (body,) in found]
    return Counter((body["round"], body["member"]) for body in bodies)


def check_sites(
    server: ServerProcess, sites: Sequence[SiteProcess], observed: Sequence[Observed]
) -> tuple[int, list[str]]:
    """Return how many uploads went on at an offset, and what is wrong with the sites' work and the uploads."""
    wrong: list[str] = []
    for site in sites:
        made = Counter(
            (line["run"], line["round"])
            for line in lines(site.log)
            if line.get("event") == "made, and kept until it is acknowledged"
        )
        wrong += [
            f"{site.name} has made round {round_} of {run} {n} times" for (run, round_), n in made.items() if n > 1
        ]
    for process in (server, *sites):
        for words in ("Traceback", "failed by a bug", "the engine failed", "DIGEST_MISMATCH", "CHUNK_CORRUPT"):
            if words in process.log:
                wrong.append(f"the log of {process.state.name} says {words!r}")
    resumed, again = check_uploads(server.log, observed)
    return resumed, wrong + again


def check_uploads(log: str, observed: Sequence[Observed]) -> tuple[int, list[str]]:
    """Return how many uploads went on at an offset, and which went on at an earlier one than had been reached."""
    reached: dict[Upload, int] = {}
    looks = sorted(observed, key=lambda look: look.log)
    at, resumed, wrong = 0, 0, []
    for line in log.splitlines(keepends=True):
        while looks and looks[0].log <= at:
            for upload, size in looks.pop(0).held.items():
                reached[upload] = max(reached.get(upload, 0), size)
        at += len(line)
        for found in lines(line):
            if found.get("event") == "receiving":
                upload = (found["run"], found["round"], found["member"], found["digest"])
                offset = found["at_byte"]
                resumed += offset > 0
                if offset < reached.get(upload, 0):
                    wrong.append(f"{upload} had reached {reached[upload]} and went on at {offset}")
                reached[upload] = max(reached.get(upload, 0), offset)
    return resumed, wrong
