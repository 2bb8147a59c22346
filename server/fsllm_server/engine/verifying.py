"""Looking at committed rounds again: are manifest, versions and uploads what was recorded, and is the result their sum?

Everything is read anew: the log from the database, payloads from the disk. Memory is a few blocks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

from google.protobuf.message import DecodeError

from fsllm.v1.tensors_pb2 import ELEMENT_TYPE_FLOAT32
from fsllm_common.algorithms import ADAPTER, package_of
from fsllm_common.errors import FsllmError
from fsllm_common.round_manifest import ChainCheck, Link, decode, digest
from fsllm_common.tensors.manifest import WIDTH, WIRE_TYPES, PayloadDigest, validate
from fsllm_server.engine import memory
from fsllm_server.engine.making import Made, Maker
from fsllm_server.engine.manifests import links
from fsllm_server.engine.reducing import installed_algorithm, open_updates, recorded_uploads, weigh
from fsllm_server.engine.replaying import replay
from fsllm_server.engine.state import Commit, Run, Update, Version
from fsllm_server.reduce import Stopped, version_of
from fsllm_server.store.blobs import Blobs, StoredVersion
from fsllm_server.store.events import Entry
from fsllm_server.store.spools import Spools

if TYPE_CHECKING:
    from fsllm_server.reduce.blocks import Scratch

TELL_SECONDS: Final = 0.2
"""At least so long between two reports of progress."""


class Verdict(StrEnum):
    """On one round; see fsllm.v1.RoundVerdict."""

    RECOMPUTED = "recomputed"
    CHAIN_ONLY = "chain only"
    BROKEN = "broken"


@dataclass(frozen=True, slots=True)
class Finding:
    """What was found about one round."""

    round: int
    link: Link
    verdict: Verdict
    problems: tuple[str, ...] = ()
    note: str = ""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a verification is, in bytes to read."""

    round: int
    done: int
    total: int


class Verification:
    """One look at some rounds of a run. ``findings`` blocks; runs in a thread."""

    def __init__(
        self,
        entries: Sequence[Entry],
        known: Run,
        recorded: Sequence[str],
        blobs: Blobs,
        spools: Spools,
        tell: Callable[[Progress], None],
        stopped: Callable[[], bool],
    ) -> None:
        """Look at nothing yet.

        Args:
            entries: The run's log, as it was just read.
            known: The run as the server has it in memory.
            recorded: The digests of its rounds' manifests, likewise.
            blobs: The versions.
            spools: The uploads.
            tell: Called now and then.
            stopped: Asked between blocks.

        """
        self._entries = entries
        self._known = known
        self._recorded = recorded
        self._blobs = blobs
        self._spools = spools
        self._tell = tell
        self._stopped = stopped
        self._done = self._total = self._round = 0
        self._told = 0.0
        self._sound: dict[str, str] = {}
        """By digest: what is wrong with the blob, empty when nothing is."""

    def findings(self, rounds: range) -> Iterator[Finding]:
        """Yield what is found about each of these rounds.

        Raises:
            Stopped: ``stopped`` said so.

        """
        from fsllm_server.reduce.blocks import scratch

        run: Run | None = None
        recorded: list[str] = []
        broken_off = ""
        try:
            for step in replay(self._known.id, self._entries):
                run = step.run
                if step.commit is not None:
                    recorded.append(step.recorded)
        except FsllmError as error:
            broken_off = error.message
        buffer = scratch()
        if run is not None:
            self._total = sum(self._size(run, run.commits[r]) for r in rounds if r < len(recorded))
        # Manifests of one round at a time: a long run of many sites has a great deal of them.
        chain = links(run, recorded) if run is not None else iter(())
        check = ChainCheck()
        for round_, known in enumerate(links(self._known, self._recorded)):
            link = next(chain, None)
            problems = check.check(link) if link is not None else []
            if round_ not in rounds:
                continue
            self._round = round_
            self._advance(0)
            if run is None or link is None:
                why = broken_off or "the log in the database no longer holds this round"
                yield Finding(round_, known, Verdict.BROKEN, (why,))
                continue
            found = [*problems, *_differences(link, known)]
            note = self._examine(run, run.commits[round_], found, buffer)
            verdict = Verdict.BROKEN if found else Verdict.CHAIN_ONLY if note else Verdict.RECOMPUTED
            if not link.recorded:
                note = "; ".join(filter(None, [note, "committed by a version of fsllm that recorded no manifests"]))
            yield Finding(round_, link, verdict, tuple(found), note)

    # One round.

    def _examine(self, run: Run, commit: Commit, found: list[str], buffer: Scratch) -> str:
        """Add what is wrong to ``found``; return why nothing was recomputed, if nothing was."""
        made = [self._blob(digest, buffer) for digest in commit.version.blobs]
        found += filter(None, made)
        updates = [contribution.update for contribution in commit.contributions]
        kept = [update for update in updates if self._path(run, update).exists()]
        if not kept:
            return "its uploads are not kept any more"
        before = len(found)
        if len(kept) < len(updates):
            missing = sorted({update.member for update in updates} - {update.member for update in kept})
            found.append(f"the upload of {', '.join(missing)} is missing")
        found += filter(None, [self._upload(run, commit, update, buffer) for update in kept])
        base = run.commits[commit.round - 1].version if commit.round else None
        # The masters, from which the round went on; where they are the same as what was published, that too.
        for blob in [*(part.master for part in base.parts), *(kept for _, kept in base.state)] if base else []:
            if problem := self._blob(blob, buffer):
                found.append(f"its base: {problem}")
        if len(found) > before:
            return ""
        return self._recompute(run, commit, base, updates, found)

    def _recompute(
        self, run: Run, commit: Commit, base: Version | None, updates: Sequence[Update], found: list[str]
    ) -> str:
        from fsllm_server.reduce.sink import Digests

        reducer, then = commit.version.reducer, commit.version.reducer_version
        if (now := version_of(reducer)) != then:
            return f"its uploads are kept, but it was made by {reducer} {then}; this fsllm has {reducer} {now}"
        try:
            algorithm = installed_algorithm(run.plan.algorithm.name)(run.plan)
        except FsllmError as error:
            return f"its uploads are kept, but {error.message}"
        weights = [contribution.weight for contribution in commit.contributions]
        tensors, sources = open_updates(run.id, updates, self._spools)
        before, readings = len(found), len(updates) + 1
        sink = Digests(lambda written: self._advance(written * readings))
        maker = Maker(algorithm, self._blobs, sink, self._stopped)
        uploads = partial(recorded_uploads, run.id, updates, self._spools)
        try:
            memory.recall(algorithm, base, self._blobs)
            completed = run.completed(commit.round)
            if weights != (right := weigh(algorithm, base, updates, sources, completed, self._stopped)):
                found.append(f"the weights are {_numbers(weights)}; the algorithm gives {_numbers(right)}")
            made = maker.make(commit.round, base, uploads, tensors, sources, weights)
        except FsllmError as error:
            found.append(f"it can not be recomputed: {error.message}")
            return ""
        again, recorded = _digests(made), _digests(commit.version)
        for what in sorted(again.keys() | recorded.keys()):
            if (got := again.get(what, "none")) != (was := recorded.get(what, "none")):
                # Only sums give the same bits on every machine.
                caution = " (decompositions do so only with the same numpy on the same kind of processor)"
                said = f"recomputing gives the {what} {got[:12]}; {was[:12]} was committed"
                found.append(said + (caution if algorithm.needs_layers else ""))
        if len(found) > before and (own := package_of(algorithm.name)) != (theirs := commit.version.package):
            found.append(f"the round was made with {theirs or 'fsllm itself'}; installed is {own or 'none'}")
        return ""

    # Files.

    def _blob(self, digest: str, buffer: Scratch) -> str:
        """Return what is wrong with a version on disk; looked at once."""
        if digest not in self._sound:
            try:
                stored = self._blobs.get(bytes.fromhex(digest))
                problem = self._payload(stored, digest, buffer)
            except (FsllmError, DecodeError, OSError, ValueError) as error:
                problem = _said(error)
            self._sound[digest] = f"version {digest[:12]} on disk: {problem}" if problem else ""
        return self._sound[digest]

    def _upload(self, run: Run, commit: Commit, update: Update, buffer: Scratch) -> str:
        """Return what is wrong with a kept upload."""
        try:
            stored = self._spools.recorded(run.id, update.round, update.member, bytes.fromhex(update.digest))
            problem = self._payload(stored, update.digest, buffer)
            if not problem and commit.round == 0 and stored.manifest.adapter_config != run.adapter_config:
                problem = "its adapter_config is another than was recorded"
        except (FsllmError, DecodeError, OSError, ValueError) as error:
            problem = _said(error)
        return f"the upload of {update.member}: {problem}" if problem else ""

    def _payload(self, stored: StoredVersion, digest: str, buffer: Scratch) -> str:
        validate(stored.manifest)
        if (size := stored.payload.stat().st_size) != stored.manifest.payload_bytes:
            return f"it has {size} bytes instead of {stored.manifest.payload_bytes}"
        got = PayloadDigest(stored.manifest)
        with stored.payload.open("rb", buffering=0) as file:
            while count := file.readinto(buffer.data):
                if self._stopped():
                    raise Stopped
                got.update(buffer.data[:count])
                self._advance(count)
        if got.hexdigest() != digest:
            return f"its digest is {got.hexdigest()[:12]} instead of {digest[:12]}"
        return "" if stored.manifest.digest.hex() == digest else "its manifest names another digest"

    def _path(self, run: Run, update: Update) -> Path:
        return self._spools.path(run.id, update.round, update.member, bytes.fromhex(update.digest))

    # Progress.

    def _size(self, run: Run, commit: Commit) -> int:
        """Return about how many bytes looking at a round takes."""
        elements = commit.version.payload_bytes // WIDTH[WIRE_TYPES[run.plan.wire.element_type]]
        master = elements * WIDTH[ELEMENT_TYPE_FLOAT32]
        made = commit.version.payload_bytes + master * (len(commit.version.blobs) - 1)
        updates = [c.update for c in commit.contributions if self._path(run, c.update).exists()]
        if not updates:
            return made
        return made + sum(update.payload_bytes for update in updates) + made * (len(updates) + 1)

    def _advance(self, count: int) -> None:
        self._done += count
        now = time.monotonic()
        if count == 0 or now - self._told >= TELL_SECONDS:
            self._told = now
            self._tell(Progress(self._round, min(self._done, self._total), self._total))


def _differences(link: Link, known: Link) -> list[str]:
    """Return what the log now says otherwise than it did when the server started, or committed the round."""
    if link.body == known.body or digest(known.body) != known.recorded:
        return []
    now, then = decode(link.body), decode(known.body)
    changed = ", ".join(key for key in then if now.get(key) != then[key])
    return [f"the log in the database was changed since the server read or wrote it: {changed}"]


def _said(error: Exception) -> str:
    if isinstance(error, FsllmError):
        return error.message
    return "its manifest can not be read" if isinstance(error, DecodeError | ValueError) else str(error)


def _numbers(values: Sequence[float]) -> str:
    return ", ".join(map(repr, values))


def _digests(made: Made | Version) -> dict[str, str]:
    """Return the digest of everything that a round makes, by what it is."""
    found = {f"server's {name}": digest for name, digest in made.state}
    for part in made.parts:
        of = "" if part.name == ADAPTER else f" of {part.name}"
        found |= {f"master{of}": part.master, f"published version{of}": part.digest}
    return found
