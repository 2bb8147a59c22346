"""The nine promises, held against what a seed has done.

Read are the history (what was sent, answered and seen), the durable log, and the server's disk: at the end, and after
each of its crashes. What a round must come to is computed from what the sites trained and sent (``arithmetic``).
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fsllm_client.site.outbox import Outbox
from fsllm_common.errors import REASONS, FsllmError
from fsllm_common.tensors.manifest import payload_digest
from fsllm_server.engine import core
from fsllm_server.engine.events import MemberForgotten, UpdateRecorded, load
from fsllm_server.engine.state import Run
from fsllm_server.store.blobs import Blobs
from fsllm_server.store.spools import Spools
from simulation import arithmetic
from simulation.history import Event
from simulation.liar import LIAR
from simulation.steering import OPERATOR

if TYPE_CHECKING:
    from simulation.world import World

USELESS = frozenset({"MANIFEST_INVALID", "NOT_FINITE", "NORM_TOO_LARGE", "UPDATE_CONFLICT", "STATE_CORRUPT"})
"""Refusals after which a site has nothing to send again."""
CLOSED = frozenset({"NOT_WANTED", "ROUND_CLOSED", "UPDATE_CONFLICT", "BASE_STALE"})
"""No answers to a payload that is recorded: it gets its receipt, as often as it comes."""
TASKS_A_MEMBER = 8
"""More of a server's tasks than so many for each member are a leak."""


@dataclass(frozen=True)
class Violation:
    """A promise that a seed has seen broken."""

    promise: int
    what: str

    def __str__(self) -> str:
        return f"promise {self.promise}: {self.what}"


class Checker:
    """Make it before the world is played, ``check`` after it."""

    def __init__(self, world: "World") -> None:
        self.world = world
        self.found: list[Violation] = []
        world.inspect = self.inspect

    def check(self) -> list[Violation]:
        """Return what was broken."""
        server = self.world.processes["server"]
        self.inspect(server.folder, power=False)
        for promise, check in enumerate(
            (
                self.receipts_last,
                self.counted_once,
                self.exactly_the_sum,
                self.never_back,
                self.nothing_partial,
                self.goes_on,
                self.named,
                self.bounded,
                self.lies_refused,
            ),
            start=1,
        ):
            self.found += [Violation(promise, what) for what in check()]
        return list(dict.fromkeys(self.found))

    # What there is to look at.

    @property
    def events(self) -> list[Event]:
        return self.world.history.events

    def log(self, run: str) -> Iterator[tuple[int, dict[str, Any]]]:
        for entry in self.world.records.logs.get(run, ()):
            yield entry.sequence, json.loads(entry.body)

    @cached_property
    def run(self) -> str:
        return next(iter(self.world.records.runs), "")

    def recorded(self, run: str) -> dict[tuple[int, str], list[tuple[int, str]]]:
        """By round and member: where in the log an update stands, and its digest."""
        found: dict[tuple[int, str], list[tuple[int, str]]] = defaultdict(list)
        for sequence, body in self.log(run):
            if body["kind"] == "update":
                found[body["round"], body["member"]].append((sequence, body["digest"]))
        return found

    def commits(self) -> dict[int, Event]:
        """By round: the commit as it was first seen."""
        seen: dict[int, Event] = {}
        for event in self.world.history.of("commit"):
            seen.setdefault(event.facts["round"], event)
        return seen

    # After each crash.

    def inspect(self, folder: Path, power: bool) -> None:
        """Look at the server's disk as its next incarnation will find it."""
        what = "a power loss" if power else "kill -9"
        for run in self.world.records.logs:
            state = self._replayed(run)
            if not state.status.ended:
                self.found += [Violation(1, f"{lost} after {what}") for lost in self._lost_uploads(folder, state)]
            for commit in state.commits:
                if (why := self._damaged(folder, commit.version.digest)) is not None:
                    self.found.append(Violation(4, f"version {commit.round} is {why} after {what}"))
        if (folder / "blobs").is_dir():
            for path in sorted((folder / "blobs").iterdir()):
                if not path.name.startswith(".") and (why := self._damaged(folder, path.name)) is not None:
                    self.found.append(Violation(5, f"blob {path.name[:12]} is {why} after {what}"))

    def _replayed(self, run: str) -> Run:
        state: Run | None = None
        for entry in self.world.records.logs[run]:
            state, _ = core.decide(state, load(entry.body))
        assert state is not None
        return state

    def _lost_uploads(self, folder: Path, state: Run) -> Iterator[str]:
        """Yield the recorded uploads of the round in progress that are not there, byte for byte."""
        spools = Spools(folder / "spools")
        for (round_, member), entries in self.recorded(state.id).items():
            if (round_, member) not in {(u.round, m) for m, u in (*state.updates.items(), *state.early.items())}:
                continue
            for _, digest in entries:
                try:
                    held = spools.recorded(state.id, round_, member, bytes.fromhex(digest)).payload.read_bytes()
                except (FsllmError, OSError) as error:
                    yield f"the update of {member} for round {round_} is lost: {error}"
                    continue
                if held != self.world.history.payload(digest):
                    yield f"the update of {member} for round {round_} is damaged"

    def _damaged(self, folder: Path, digest: str) -> str | None:
        try:
            blob = Blobs(folder / "blobs").get(bytes.fromhex(digest))
            whole = payload_digest(blob.manifest, blob.payload) == bytes.fromhex(digest)
        except (FsllmError, OSError) as error:
            return f"gone ({error})"
        return None if whole else "damaged"

    # 1. An acknowledged upload survives.

    def receipts_last(self) -> Iterable[str]:
        for event in self.world.history.of("receipt", "send-receipt"):
            facts = event.facts
            known = self.recorded(facts["run"]).get((facts["round"], facts["member"]), [])
            if facts["digest"] not in [digest for _, digest in known]:
                yield f"{facts['member']} has a receipt for round {facts['round']} that the log does not know"

    # 2. A contribution counts exactly once.

    def counted_once(self) -> Iterable[str]:
        for (round_, member), entries in self.recorded(self.run).items():
            if len(entries) != 1:
                yield f"{member} is recorded {len(entries)} times for round {round_}"
        for round_, commit in self.commits().items():
            members = [share[0] for share in commit.facts["shares"]]
            if len(set(members)) != len(members):
                yield f"commit {round_} counts a member twice: {members}"
        receipts: dict[tuple[str, int], str] = {}
        for event in self.world.history.of("receipt"):
            facts = event.facts
            if receipts.setdefault((facts["member"], facts["round"]), facts["digest"]) != facts["digest"]:
                yield f"{facts['member']} has receipts for two payloads of round {facts['round']}"

    # 3. A committed round is exactly the weighted reduction of its acknowledged set.

    def exactly_the_sum(self) -> Iterable[str]:
        plan = self.world.script.plan
        kind = plan.wire.element_type
        master: arithmetic.Array | None = None
        acknowledged = self._acknowledged()
        for round_, commit in sorted(self.commits().items()):
            shares = commit.facts["shares"]
            wanted = acknowledged.get(round_, {})
            if sorted(member for member, *_ in shares) != sorted(wanted):
                yield f"commit {round_} counts {[s[0] for s in shares]}; acknowledged were {sorted(wanted)}"
                return
            deltas = [self._sent(member, digest, wanted[member]) for member, digest, *_ in shares]
            if any(delta is None for delta in deltas):
                yield f"commit {round_} counts a payload that nobody has trained"
                return
            if round_ == 0:
                master = deltas[0]
            elif master is not None:
                behind = [round_ - wanted[member] for member, *_ in shares]
                right = arithmetic.shares(plan, [self._counts(member) for member, *_ in shares], behind)
                if [weight for _, _, weight, *_ in shares] != right:
                    yield f"commit {round_} has the shares {[s[2] for s in shares]} instead of {right}"
                master = arithmetic.next_version(plan, master, list(zip(right, deltas, strict=True)))  # type: ignore[arg-type]
            server = self.world.processes["server"]
            published = Blobs(server.folder / "blobs").folder / commit.facts["digest"] / "payload"
            if (
                master is None
                or not published.exists()
                or published.read_bytes() != arithmetic.on_the_wire(master, kind)
            ):
                yield f"version {round_} is not the weighted sum of its updates"
                return

    def _acknowledged(self) -> dict[int, dict[str, int]]:
        """Return whose updates each round had to count, and of which round they were.

        Those that were recorded before its reduction began, and after the one before, of members not revoked by then.
        Without a buffer they are of the round itself.
        """
        counted: dict[int, dict[str, int]] = {}
        waiting: dict[str, int] = {}
        state: Run | None = None
        for entry in self.world.records.logs.get(self.run, ()):
            event = load(entry.body)
            before = state
            state, _ = core.decide(state, event)
            if isinstance(event, UpdateRecorded):
                waiting[event.member] = event.round
            elif isinstance(event, MemberForgotten):
                waiting.pop(event.member, None)
            if state.phase == "reduce" and (before is None or (before.phase, before.round) != ("reduce", state.round)):
                counted[state.round], waiting = waiting, {}
        return counted

    def _sent(self, member: str, digest: str, round_: int) -> arithmetic.Array | None:
        """Return the values of an update as they crossed the wire, if they are what the member has made."""
        plan = self.world.script.plan
        kind = plan.wire.element_type if round_ else "fp32"
        payload = self.world.history.payload(digest)
        if round_ == 0:
            made = [arithmetic.numbers(f"zero {plan.seed}", 0.02)]
        else:
            made = [delta for _, delta in self.world.deltas.get((member, self.run, round_), [])]
        right = [arithmetic.on_the_wire(arithmetic.flat(arrays), kind) for arrays in made]
        # A pipeline changes what was trained, so that only what was sent can be compared.
        if payload not in right and not (round_ and plan.pipeline):
            return None
        return arithmetic.from_the_wire(payload, kind)

    def _counts(self, member: str) -> tuple[int, int]:
        if any(stage.stage == "noise" for stage in self.world.script.plan.pipeline):
            return 0, 0
        examples = self.world.examples[member]
        return examples, 7 * examples

    # 4. A committed round never changes, and nobody goes back.

    def never_back(self) -> Iterable[str]:
        versions: dict[int, str] = {}
        commits = self.commits()
        for event in self.world.history.of("commit"):
            if event.facts != commits[event.facts["round"]].facts:
                yield f"commit {event.facts['round']} was seen in two forms"
        latest: dict[str, int] = {}
        for event in self.world.history.of("order"):
            number, digest = event.facts["base"], event.facts["digest"]
            if number is None:
                continue
            if versions.setdefault(number, digest) != digest:
                yield f"version {number} was {versions[number][:12]} and then {digest[:12]}"
            if latest.get(event.who, 0) > number:
                yield f"{event.who} saw version {latest[event.who]} and then {number}"
            latest[event.who] = number
        for round_, commit in commits.items():
            if versions.get(round_, commit.facts["digest"]) != commit.facts["digest"]:
                yield f"version {round_} was committed as another than the sites were sent"
        rounds = [e.facts["round"] for e in self.world.history.of("commit") if e.who == OPERATOR]
        if sorted(set(rounds)) != list(range(len(set(rounds)))):
            yield f"the commits seen are {sorted(set(rounds))}"

    # 5. What is partial or refused touches nothing.

    def nothing_partial(self) -> Iterable[str]:
        acknowledged = {digest for entries in self.recorded(self.run).values() for _, digest in entries}
        for round_, commit in self.commits().items():
            for member, digest, *_ in commit.facts["shares"]:
                if digest not in acknowledged:
                    yield f"commit {round_} counts {member}'s {digest[:12]}, which was never acknowledged"
        for event in self.world.history.of("lie"):
            if event.facts.get("digest") in acknowledged:
                yield f"the lie {event.facts['name']} was recorded"

    # 6. Work goes on where it stood.

    def goes_on(self) -> Iterable[str]:
        for _ in self.world.history.of("stuck"):
            yield "the run does not end, long after the last fault"
        yield from self._states()
        announced: set[tuple[str, str, int]] = set()
        for event in self.events:
            key = event.who, event.facts.get("run", ""), event.facts.get("round", -1)
            match event.what:
                case "upload":
                    announced.add(key)
                case "refuse" if event.facts["reason"] in USELESS:
                    announced.discard((event.facts["member"], self.run, event.facts["round"]))
                case "training" if key in announced:
                    yield f"{event.who} trains round {key[2]} again, whose delta was in its outbox"
                case "send-ready" if event.facts["offset"] < event.facts["held"] and self._is_true(event.facts):
                    facts = event.facts
                    yield f"{facts['member']} must go on at {facts['offset']}, though {facts['held']} bytes are held"
                case _:
                    pass

    def _states(self) -> Iterable[str]:
        """What a site keeps is of the last update of its own that counts."""
        recorded = self.recorded(self.run)
        for event in self.world.history.of("training"):
            round_, state = event.facts["round"], event.facts["state"]
            counted = [number for number, member in recorded if member == event.who and 0 < number < round_]
            if state != max(counted, default=None):
                yield f"{event.who} begins round {round_} with its state of round {state}; counted are {counted}"

    def _is_true(self, facts: dict[str, Any]) -> bool:
        """A lie that was found out goes, though a crash may keep its teller from hearing why."""
        return facts["member"] != LIAR.name or facts["digest"] in self.world.history.honest

    # 7. Every outcome has a name, and trying again is safe.

    def named(self) -> Iterable[str]:
        yield from self.world.complaints
        for event in self.world.history.of("outcome", "refuse"):
            reason = event.facts["reason"]
            if reason != "OK" and (reason not in REASONS or reason == "INTERNAL"):
                yield f"{event.facts.get('method', 'Upload')} of {event.who} ended with {reason}"
        yield from self._refused_again()
        if len(self.world.records.runs) > 1:
            yield f"one submission, tried again, made {len(self.world.records.runs)} runs"
        told = [e.facts["sequence"] for e in self.world.history.of("told") if "sequence" in e.facts]
        if told != list(range(1, len(told) + 1)):
            yield "who watches has not heard of everything exactly once"

    def _refused_again(self) -> Iterable[str]:
        recorded: set[tuple[str, str, int, str]] = set()
        forgotten: set[str] = set()
        for event in self.world.history.of("logged", "refuse"):
            facts = event.facts
            if event.what == "refuse":
                again = facts["run"], facts["member"], facts["round"], facts["digest"]
                if facts["reason"] in CLOSED and again in recorded and facts["member"] not in forgotten:
                    yield f"{facts['member']} tried round {facts['round']} again, which is recorded: {facts['reason']}"
            elif facts["kind"] in ("update", "forgotten"):
                body = json.loads(facts["body"])
                if facts["kind"] == "update":
                    recorded.add((facts["run"], body["member"], body["round"], body["digest"]))
                else:
                    forgotten.add(body["member"])

    # 8. What is held is bounded.

    def bounded(self) -> Iterable[str]:
        slots = self.world.script.server["uploads_at_once"]
        for event in self.world.history.of("send-ready"):
            if event.facts["at_once"] > slots:
                yield f"{event.facts['at_once']} uploads at once, with {slots} slots"
        members = len(self.world.records.members)
        tasks = self.world.tasks_of("server")
        if tasks > TASKS_A_MEMBER * members:
            yield f"the server has {tasks} tasks for {members} members"
        if (files := self.world.bounds["files"]) > slots + members:
            yield f"{files} spools are open at once, with {slots} slots"
        yield from self._left()

    def _left(self) -> Iterable[str]:
        """What sites keep of a run that has ended, where nothing was in the way since."""
        told = [event.what for event in self.world.history.of("quiet", "end")]
        for nature in self.world.script.natures if told == ["quiet", "end"] else ():
            process, record = self.world.processes.get(nature.name), self.world.records.members[nature.name]
            if process is not None and process.alive and record.standing != "revoked":
                try:
                    left = Outbox(process.folder / "outbox").all()
                except FsllmError as error:
                    yield f"{nature.name} can not read its outbox: {error.message}"
                    continue
                for parcel in left:
                    yield f"{nature.name} keeps what it made in round {parcel.begin.round} of a run that has ended"

    # 9. Bad input is refused by name.

    def lies_refused(self) -> Iterable[str]:
        for event in self.world.history.of("lie"):
            facts = event.facts
            if facts["got"] not in facts["expected"]:
                yield f"the lie {facts['name']} got {facts['got']}, not {' or '.join(sorted(facts['expected']))}"
