"""Verifying a run: the server recomputes, and what can be checked from here is checked from here.

The server's word is not enough for: that each manifest has the digest that is claimed for it, names the digest of the
one before and starts from its result; that versions, updates and weights are those that the run shows; and that an
earlier copy of the manifests says the same.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import grpc
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from fsllm.v1.control_pb2 import (
    ROUND_VERDICT_BROKEN,
    ROUND_VERDICT_CHAIN_ONLY,
    ROUND_VERDICT_RECOMPUTED,
    Commit,
    RoundFinding,
    RoundManifest,
    Run,
    VerifyProgress,
    VerifyRunRequest,
)
from fsllm_common.errors import FsllmError, InputError
from fsllm_common.round_manifest import Link, check_chain, decode, digest, encode
from fsllm_operator.connection import Connection, explain

VERDICTS: Final = {
    ROUND_VERDICT_RECOMPUTED: "recomputed",
    ROUND_VERDICT_CHAIN_ONLY: "chain only",
    ROUND_VERDICT_BROKEN: "BROKEN",
}
_COLOURS: Final = {"recomputed": "green", "chain only": "yellow", "BROKEN": "bold red"}


@dataclass(frozen=True, slots=True)
class Verified:
    """What is known of one round."""

    round: int
    verdict: str
    """recomputed, chain only or BROKEN."""
    version: str
    """The digest of the version that the round made."""
    manifest: str
    """The digest of the round's manifest."""
    updates: int
    problems: tuple[str, ...]
    note: str

    def as_object(self) -> dict[str, Any]:
        """Return it for ``--json``."""
        return asdict(self)


def verify_run(
    connection: Connection,
    run: Run,
    round_: int | None,
    *,
    copy: Sequence[RoundManifest] = (),
    tell: Callable[[VerifyProgress], None] = lambda _: None,
) -> list[Verified]:
    """Return what is found about each committed round, or about one.

    Args:
        connection: To the server.
        run: As GetRun has just told it.
        round_: Which; None: all.
        copy: Manifests that were exported before, from round 0 on.
        tell: Called with the server's progress.

    Raises:
        FsllmError: RUN_UNKNOWN, VERSION_UNKNOWN, SERVER_UNREACHABLE.

    """
    findings = _ask(connection, run, round_, tell)
    manifests = connection.manifests(run.run_id)
    chain = check_chain([Link(one.body, one.digest.hex()) for one in manifests])
    wanted = range(len(run.commits)) if round_ is None else [round_]
    out = []
    for number in wanted:
        finding = findings.get(number)
        manifest = manifests[number] if number < len(manifests) else RoundManifest()
        problems = [*finding.problems] if finding is not None else ["the server says nothing about this round"]
        if number < len(chain):
            problems += [problem for problem in chain[number] if problem not in problems]
        if finding is not None and finding.manifest.digest != manifest.digest:
            problems.append("the server sends two manifests with different digests")
        problems += _against_commit(manifest, run.commits[number])
        if number < len(copy) and copy[number].body != manifest.body:
            problems.append("the manifest is another than in the copy")
        verdict = ROUND_VERDICT_BROKEN if problems or finding is None else finding.verdict
        out.append(
            Verified(
                number,
                VERDICTS.get(verdict, "BROKEN"),
                run.commits[number].version.digest.hex(),
                manifest.digest.hex() or digest(manifest.body),
                len(run.commits[number].contributions),
                tuple(problems),
                finding.note if finding is not None else "",
            )
        )
    if round_ is None and len(copy) > len(run.commits):
        lost = f"the copy holds {len(copy)} rounds; the server has {len(run.commits)}"
        out.append(Verified(len(run.commits), "BROKEN", "", digest(copy[len(run.commits)].body), 0, (lost,), ""))
    return out


def read_copy(path: Path) -> list[RoundManifest]:
    """Return the manifests of a ``manifests.json``.

    Raises:
        InputError: SETTING_INVALID: it is none.

    """
    try:
        entries = json.loads(path.read_bytes())
        return [
            RoundManifest(
                round=entry["manifest"]["round"],
                body=encode(entry["manifest"]),
                digest=bytes.fromhex(entry["digest"] or ""),
            )
            for entry in entries
        ]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(
            "SETTING_INVALID",
            f"{path} does not hold manifests",
            cure="Name the manifests.json of an earlier `fsllm run export`.",
        ) from error


def table(verified: Sequence[Verified]) -> Table:
    """Return the findings for people."""
    shown = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("round", "version", "updates", "verdict", ""):
        shown.add_column(heading, overflow="fold")
    for one in verified:
        colour = _COLOURS[one.verdict]
        said = "; ".join([*one.problems, *([one.note] if one.note else [])])
        verdict = f"[{colour}]{one.verdict}[/]"
        shown.add_row(str(one.round), one.version[:12], str(one.updates), verdict, said)
    return shown


def progress_bar(console: Console) -> Progress:
    """Return a bar of the bytes that the server reads."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True)


def demand_sound(run: Run, verified: Sequence[Verified]) -> None:
    """Raise unless every round is sound.

    Raises:
        FsllmError: ROUND_BROKEN, naming the rounds.

    """
    broken = [one.round for one in verified if one.verdict == "BROKEN"]
    if broken:
        rounds = f"round{'s' if len(broken) > 1 else ''} {', '.join(map(str, broken))}"
        raise FsllmError("ROUND_BROKEN", f"Run {run.name} ({run.run_id}): {rounds} of {len(verified)} looked at")


def _ask(
    connection: Connection, run: Run, round_: int | None, tell: Callable[[VerifyProgress], None]
) -> dict[int, RoundFinding]:
    findings: dict[int, RoundFinding] = {}
    stream = connection.control.VerifyRun(VerifyRunRequest(run_id=run.run_id, round=round_))
    try:
        for response in stream:
            if response.HasField("progress"):
                tell(response.progress)
            else:
                findings[response.finding.manifest.round] = response.finding
    except grpc.RpcError as error:
        raise explain(error, connection.server) from error
    finally:
        stream.cancel()
    return findings


def _against_commit(manifest: RoundManifest, commit: Commit) -> list[str]:
    """Return where a manifest differs from the round as the run shows it."""
    if not manifest.body:
        return ["the server has no manifest of this round"]
    try:
        said = decode(manifest.body)
    except FsllmError:
        return []  # the chain says so already
    problems = []
    if said["result"]["published"] != commit.version.digest.hex():
        problems.append("the run shows another version than the manifest")
    shown = [(c.member, c.digest.hex(), c.examples, c.tokens, c.weight) for c in commit.contributions]
    if [(u["member"], u["digest"], u["examples"], u["tokens"], u["weight"]) for u in said["updates"]] != shown:
        problems.append("the run shows other updates or weights than the manifest")
    return problems
