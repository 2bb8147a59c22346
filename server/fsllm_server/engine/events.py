"""What can happen to a run. The log of these is the truth; the state is what replaying them gives.

Every event is recorded before anything is done about it. ``version`` is the shape of the events as a whole: a change by
which old logs would be misread raises it, and translates the old shape in ``load``.
"""

from __future__ import annotations

from typing import Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from fsllm_common.algorithms import ADAPTER
from fsllm_common.errors import FsllmError
from fsllm_server.engine.rules import FIRST

VERSION: Final = 1


class Record(BaseModel):
    """The base of all events and of their parts: immutable and strict."""

    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="constants")


class Metric(Record):
    """One number that a member reports; see fsllm.v1.Metric."""

    name: str
    value: float
    weight: float


class Part(Record):
    """A set of tensors of a version, on disk; see fsllm.v1.VersionPart. Digests are hexadecimal."""

    name: str
    digest: str
    """Of the published payload, in the plan's wire type."""
    master: str
    """Of the float32 payload; the same digest when the wire type is fp32."""
    payload_bytes: int
    """Of the published payload."""


class _Event(Record):
    version: Literal[1] = VERSION
    at: float
    """When it was recorded, in seconds since the epoch. For display: no decision looks at it."""


class Submitted(_Event):
    """An operator submitted the run."""

    kind: Literal["submitted"] = "submitted"
    run_id: str
    plan: str
    """Canonical JSON."""
    needs_trainer: bool
    """Of the plan's algorithm, recorded here because looking it up is not pure."""
    needs_trusted: bool = False
    """Likewise."""
    in_pairs: bool = False
    """Likewise."""
    rules: int = FIRST
    """The version of the decisions that the run goes by (``engine/rules.py``)."""


class MemberAttached(_Event):
    """A member's daemon opened its stream of orders."""

    kind: Literal["attached"] = "attached"
    member: str
    role: Literal["site", "evaluator"]
    held: tuple[str, ...]
    """The orders of this run that it still has in hand."""


class MemberDetached(_Event):
    """The stream ended. Its orders stand: it may come back."""

    kind: Literal["detached"] = "detached"
    member: str


class Answered(_Event):
    """A member ended an order other than by an upload."""

    kind: Literal["answered"] = "answered"
    member: str
    order_id: str
    outcome: Literal["declined", "failed", "done"]
    reason: str = ""
    message: str = ""
    metrics: tuple[Metric, ...] = ()
    rank: int = 0
    """Of the member's adapter, from its answer to JOIN; 0: the plan's."""


class UpdateRecorded(_Event):
    """A verified upload is on disk: it counts, once."""

    kind: Literal["update"] = "update"
    member: str
    order_id: str
    round: int
    digest: str
    """Hexadecimal."""
    payload_bytes: int
    norm: float
    examples: int
    tokens: int
    steps: int
    metrics: tuple[Metric, ...] = ()
    adapter_config: str = ""
    """Version 0 only."""
    element_type: str = ""
    """fp32, fp16 or bf16; empty in logs of fsllm 0.1.0."""
    model_digest: str = ""
    """Hexadecimal: of the model that the site has rebuilt, where the method has it do so."""


class UpdateRejected(_Event):
    """An upload was refused. Changes nothing; recorded for those who watch."""

    kind: Literal["rejected"] = "rejected"
    member: str
    round: int
    reason: str
    message: str


class Reduced(_Event):
    """The round's updates have become a version on disk."""

    kind: Literal["reduced"] = "reduced"
    job: str
    """The Reduce effect that this answers."""
    parts: tuple[Part, ...]
    """All of the version's, sorted by name, those that stay as they were too."""
    weights: tuple[tuple[str, float], ...]
    """Each contributor's share in the sum."""
    state: tuple[tuple[str, str], ...] = ()
    """The server's state after it: (name, digest), sorted."""
    reducer: str = "sum"
    """What was done with the updates; see algorithms.Algorithm.reducer."""
    package: str = ""
    """Name and version of the package that the algorithm is of, where it is not fsllm's own."""
    reducer_version: int = 1
    """Of the reducer's arithmetic (``reduce.version_of``); what fsllm had before logs said so."""

    @model_validator(mode="before")
    @classmethod
    def _from_earlier(cls, given: object) -> object:
        """Read logs of fsllm 0.1.0, whose versions were in one piece."""
        if isinstance(given, dict) and "digest" in given:
            given = dict(given)
            given["parts"] = [
                {"name": ADAPTER, **{key: given.pop(key) for key in ("digest", "master", "payload_bytes")}}
            ]
        return given


class ReduceFailed(_Event):
    """The reduction could not be done; the run pauses."""

    kind: Literal["reduce-failed"] = "reduce-failed"
    job: str
    reason: str
    message: str


class DeadlinePassed(_Event):
    """A timer that the run had set went off."""

    kind: Literal["deadline"] = "deadline"
    timer: str


class MemberIdle(_Event):
    """Neither a step nor a byte of an order has advanced for the plan's idle time."""

    kind: Literal["idle"] = "idle"
    member: str
    order_id: str


class ServerRestarted(_Event):
    """The server started with this run under way: nobody is attached yet, and no timer runs."""

    kind: Literal["restarted"] = "restarted"


class Restored(_Event):
    """The server's state was restored from a back-up: what happened after that was made is not in this log."""

    kind: Literal["restored"] = "restored"
    epoch: str
    """The restoration's name; the same again changes nothing."""
    made: str
    """When the back-up was made."""


class Paused(_Event):
    """An operator paused the run."""

    kind: Literal["paused"] = "paused"


class Resumed(_Event):
    """An operator resumed the run."""

    kind: Literal["resumed"] = "resumed"


class Cancelled(_Event):
    """An operator cancelled the run."""

    kind: Literal["cancelled"] = "cancelled"


class MemberForgotten(_Event):
    """The member was revoked."""

    kind: Literal["forgotten"] = "forgotten"
    member: str


Event = Annotated[
    Submitted
    | MemberAttached
    | MemberDetached
    | Answered
    | UpdateRecorded
    | UpdateRejected
    | Reduced
    | ReduceFailed
    | DeadlinePassed
    | MemberIdle
    | ServerRestarted
    | Restored
    | Paused
    | Resumed
    | Cancelled
    | MemberForgotten,
    Field(discriminator="kind"),
]

_adapter: TypeAdapter[Event] = TypeAdapter(Event)


def dump(event: Event) -> str:
    """Return the event as JSON."""
    return event.model_dump_json()


def load(body: str) -> Event:
    """Return an event from its JSON.

    Raises:
        FsllmError: STATE_CORRUPT: it is none that this version of fsllm writes.

    """
    try:
        return _adapter.validate_json(body)
    except ValidationError as error:
        raise FsllmError("STATE_CORRUPT", f"a recorded event can not be read: {error.error_count()} errors") from error
