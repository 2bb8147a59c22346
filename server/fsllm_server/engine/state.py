"""A run's state: frozen, and nothing but what replaying the run's log gives.

Mappings are never changed in place: ``turn.Turn`` replaces them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum

from fsllm_common.plan import Plan
from fsllm_common.tensors.manifest import split_part_name, version_digest
from fsllm_server.engine.events import Metric, Part
from fsllm_server.engine.rules import LATEST


class Status(StrEnum):
    """Where a run stands as a whole."""

    RUNNING = "running"
    PAUSED = "paused"
    DONE = "done"
    CANCELLED = "cancelled"

    @property
    def ended(self) -> bool:
        """Nothing will happen to the run any more."""
        return self in (Status.DONE, Status.CANCELLED)


class Standing(StrEnum):
    """How far a member has come in a run."""

    OFFERED = "offered"
    JOINED = "joined"
    READY = "ready"
    DECLINED = "declined"


class Kind(StrEnum):
    """Of an order; see fsllm.v1.OrderKind."""

    JOIN = "join"
    BUILD = "build"
    CHECK = "check"
    TRAIN = "train"
    EVALUATE = "evaluate"


@dataclass(frozen=True, slots=True)
class Member:
    """A site or an evaluator that the run has been offered to."""

    name: str
    role: str
    attached: bool = True
    left: int | None = None
    """The round in which it was detached last."""
    standing: Standing = Standing.OFFERED
    message: str = ""
    """Why it declined, or what failed last."""
    epsilon: float | None = None
    rank: int = 0
    """Of its adapter; 0: the plan's."""
    idle: bool = False
    """It was offered the run and has shown no progress since; nobody waits for it."""

    @property
    def is_site(self) -> bool:
        """It has data to train on; an evaluator has not."""
        return self.role == "site"


@dataclass(frozen=True, slots=True)
class Version:
    """A version of the adapter on disk. Digests are hexadecimal."""

    number: int
    parts: tuple[Part, ...]
    """Sorted by name."""
    state: tuple[tuple[str, str], ...] = ()
    """The server's state after the round that made it: (name, digest), e.g. of an optimizer's moments."""
    reducer: str = "sum"
    """Of the updates that it was made of."""
    package: str = ""
    """Where its algorithm is not fsllm's own; see events.Reduced."""
    reducer_version: int = 1
    """Of that arithmetic; see reduce.version_of."""

    @property
    def digest(self) -> str:
        """What names it; see fsllm.v1.Version."""
        return version_digest([(part.name, part.digest) for part in self.parts])

    @property
    def master(self) -> str:
        """The same of its float32 tensors."""
        return version_digest([(part.name, part.master) for part in self.parts])

    @property
    def payload_bytes(self) -> int:
        """Of all that is published of it."""
        return sum(part.payload_bytes for part in self.parts)

    @property
    def blobs(self) -> list[str]:
        """The digests of all that is kept of it, each once."""
        published = [part.digest for part in self.parts]
        masters = [part.master for part in self.parts]
        return list(dict.fromkeys([*published, *masters, *(digest for _, digest in self.state)]))

    def view(self, rank: int) -> Version:
        """Return what a member of this rank gets of it; see ``Part.name``. 0 stands for the largest."""
        ranks = [split_part_name(part.name)[1] for part in self.parts]
        wanted = (0, rank or max(ranks, default=0))
        parts = tuple(part for part, of in zip(self.parts, ranks, strict=True) if of in wanted)
        return replace(self, parts=parts)


@dataclass(frozen=True, slots=True)
class Order:
    """An open order: sent, or to be sent when the member attaches, and neither answered nor withdrawn."""

    id: str
    member: str
    round: int
    kind: Kind
    base: Version | None


@dataclass(frozen=True, slots=True)
class Timer:
    """A timer that runs."""

    id: str
    seconds: float


@dataclass(frozen=True, slots=True)
class Update:
    """A recorded update of the round in progress."""

    member: str
    round: int
    digest: str
    payload_bytes: int
    examples: int
    tokens: int
    steps: int
    metrics: tuple[Metric, ...] = ()
    element_type: str = ""
    """In the plan's words; empty in logs that did not say."""
    trusted: bool = False
    """An evaluator's."""
    model_digest: str = ""
    """Hexadecimal: of the model that the site has rebuilt, where the method has it do so."""


@dataclass(frozen=True, slots=True)
class Contribution:
    """A committed update and its share in the sum."""

    update: Update
    weight: float


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What one member measured of a version."""

    member: str
    role: str
    metrics: tuple[Metric, ...]


@dataclass(frozen=True, slots=True)
class Commit:
    """A committed round. Never changes."""

    round: int
    version: Version
    at: float
    contributions: tuple[Contribution, ...]
    evaluations: tuple[Evaluation, ...]
    phase_seconds: tuple[tuple[str, float], ...]
    epoch: str = ""
    """The run's, when it was committed."""
    manifest: str = ""
    """The digest of the round's manifest (``engine/manifests.py``)."""


@dataclass(frozen=True, slots=True)
class Run:
    """Everything about a run that decisions depend on."""

    id: str
    plan: Plan
    needs_trainer: bool
    created: float
    rules: int = field(default=LATEST, kw_only=True)
    """The version of the decisions that it goes by (``engine/rules.py``)."""
    needs_trusted: bool = field(default=False, kw_only=True)
    """Evaluators train too, and their updates are compared with."""
    in_pairs: bool = field(default=False, kw_only=True)
    """Each even round completes the odd one before it: by the same sites, which count the same."""
    source: str = ""
    """The plan as submitted: canonical JSON. Manifests quote this, for ``plan`` gets the keys of later versions."""
    status: Status = Status.RUNNING
    reason: str = ""
    """Why it is paused: a reason of errors.REASONS; empty when an operator did it."""
    message: str = ""
    """The same in a sentence."""

    phase: str = "init"
    """The name of one of ``phases``; empty when the run has ended."""
    phase_since: float = 0.0
    phase_seconds: Mapping[str, float] = field(default_factory=dict)
    """Of the round in progress, without the phase in progress."""

    round: int = 0
    issued: int = 0
    """How many names of orders, jobs and timers were given out: makes each unique."""
    failures: int = 0
    """Failed rounds in a row."""
    failure: str = ""
    """Why the last attempt failed."""

    members: Mapping[str, Member] = field(default_factory=dict)
    orders: Mapping[str, Order] = field(default_factory=dict)
    timers: Mapping[str, Timer] = field(default_factory=dict)
    """By what they are for: those that run."""
    overdue: frozenset[str] = frozenset()
    """What the timers that went off in this phase were for."""
    updates: Mapping[str, Update] = field(default_factory=dict)
    """By member: the recorded updates of the round in progress; they outlive a failed attempt."""
    early: Mapping[str, Update] = field(default_factory=dict)
    """By member: asynchronous updates that came while a version was being made, for the next one."""
    weights: Mapping[str, float] = field(default_factory=dict)
    """By member: set when the round's updates have been reduced."""
    evaluations: Mapping[str, Evaluation] = field(default_factory=dict)
    awaited: frozenset[str] = frozenset()
    """Those who had gone in this round when its version was to be measured: they are asked as soon as they are back."""
    job: str = ""
    """The reduction in progress."""
    cohort: tuple[str, ...] = ()
    """The sites asked in this attempt, and those whose update of the round is already here."""
    builders: tuple[str, ...] = ()
    """The sites that were asked to build version 0, the last one last."""
    zero: Version | None = None
    """Version 0, from its publication on."""
    candidate: Version | None = None
    """The version reduced and not yet committed."""
    adapter_config: str = ""
    epoch: str = ""
    """The name of the last restoration from a back-up; empty when there was none."""
    commits: tuple[Commit, ...] = ()

    @property
    def latest(self) -> Version | None:
        """The latest committed version."""
        return self.commits[-1].version if self.commits else None

    @property
    def active(self) -> bool:
        """It is running: neither paused nor ended."""
        return self.status is Status.RUNNING

    @property
    def asynchronous(self) -> bool:
        """No site waits for another."""
        return self.plan.cohort.buffer is not None

    @property
    def quorum(self) -> int:
        """The fewest updates that make the round: of a pair's second one, those of all asked who are not revoked."""
        if self.completed(self.round):
            return max(1, len(self.members.keys() & set(self.cohort)))
        return self.plan.cohort.quorum

    def completed(self, round_: int) -> dict[str, float]:
        """Return the shares of the updates that a round completes, by member; nothing where a round stands alone."""
        if not self.in_pairs or round_ % 2 or round_ == 0:
            return {}
        return {one.update.member: one.weight for one in self.commits[round_ - 1].contributions}

    def training(self) -> list[str]:
        """Return the members with an open TRAIN order, sorted."""
        return [order.member for order in self.open_orders(Kind.TRAIN)]

    def trusted(self) -> list[str]:
        """Return the evaluators that train, where the method compares with them, sorted; those ready and attached."""
        return sorted(
            member.name
            for member in self.members.values()
            if self.needs_trusted and not member.is_site and member.attached and member.standing is Standing.READY
        )

    def open_orders(self, kind: Kind) -> list[Order]:
        """Return the open orders of a kind, by member."""
        return sorted((o for o in self.orders.values() if o.kind is kind), key=lambda o: o.member)

    def orders_of(self, member: str) -> list[Order]:
        """Return a member's open orders."""
        return [order for order in self.orders.values() if order.member == member]

    def sites(self, *standings: Standing, attached: bool = True) -> list[str]:
        """Return the sites of these standings, sorted; only those attached unless told otherwise."""
        return sorted(
            member.name
            for member in self.members.values()
            if member.is_site and member.standing in standings and (member.attached or not attached)
        )
