"""What the daemon and its trainer worker say to each other: JSON lines over a Unix socket.

The daemon listens, starts the worker's process group (one process a rank) and every rank connects and sends ``Here``.
The daemon sends each order to every rank, one order at a time, and EVERY rank ends it with exactly one ``Finished`` or
``GaveUp``: so the daemon knows when the ranks are out of step (one has given up, another waits for it) and ends the
group. Only rank 0 sends ``Advanced``, and only what its ``Finished`` holds counts. Tensors never pass through the
socket: they lie in safetensors files whose paths the order names. A rank whose socket closes ends its process, so no
worker outlives its daemon.
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from fsllm_common.plan import Plan


class Message(BaseModel):
    """One line on the socket."""

    model_config = ConfigDict(extra="forbid", frozen=True)


# From the daemon.


class Prepare(Message):
    """Load the base model and tokenise the data of this run. A later one takes the place of the one before."""

    kind: Literal["prepare"] = "prepare"
    run_id: str
    plan: Plan
    model: Path
    data: Path
    role: Literal["site", "evaluator"]
    deepspeed_config: Path | None = None
    """The site's own DeepSpeed JSON, which replaces the plan's deepspeed section."""


class Build(Message):
    """Write version 0 of the adapter, made from the plan's seed on CPU in float32."""

    kind: Literal["build"] = "build"
    adapter: Path
    """Where to write: safetensors, with the adapter's PEFT configuration in the metadata key ``adapter_config``."""
    rank: int | None = None
    """Of the adapter, where it is not this site's own: version 0 is of the plan's, the largest."""


class Train(Message):
    """Load ``base``, train one round, write ``delta`` = local - base in float32 of what the round sends.

    ``base`` holds all tensors of the version: the adapter's, and others that the method adds to it.
    """

    kind: Literal["train"] = "train"
    round: int
    """Counted from 1."""
    base: Path
    delta: Path
    resume: Path | None = None
    """The site's private folder of this run (``kept``: optimizer, method, personal adapter); made when absent. A
    personalised method's own adapter is left there, too (``own_adapter``)."""


class Evaluate(Message):
    """Measure ``adapter`` on the validation rows (a site) or on all rows (an evaluator)."""

    kind: Literal["evaluate"] = "evaluate"
    adapter: Path
    """All tensors of the version, as for ``Train``."""
    version: int = 0
    """Its number; what the site keeps goes with it as with the round after it."""
    resume: Path | None = None
    """The site's private folder: a personalised method's own adapter is measured, and left there (``own_adapter``)."""


class Account(Message):
    """Compute the epsilon of so many releases with the Gaussian mechanism (opacus's accountant)."""

    kind: Literal["account"] = "account"
    multiplier: float
    releases: int
    delta: float


class Cancel(Message):
    """Give up the order in hand at its next step, with ``ORDER_UNKNOWN``. Has no answer of its own."""

    kind: Literal["cancel"] = "cancel"


class Stop(Message):
    """End the process in good order."""

    kind: Literal["stop"] = "stop"


Order = Annotated[Prepare | Build | Train | Evaluate | Account | Cancel | Stop, Field(discriminator="kind")]


# From the worker.


class Here(Message):
    """A rank has started."""

    kind: Literal["here"] = "here"
    rank: int
    world: int
    pid: int


class Advanced(Message):
    """Something moved: rows read, steps taken, examples evaluated."""

    kind: Literal["advanced"] = "advanced"
    activity: Literal["reading", "loading", "building", "training", "evaluating"]
    done: int
    total: int
    metrics: dict[str, float] = {}
    """E.g. loss, tokens_per_second, learning_rate."""


class Finished(Message):
    """The order is done. What ``counts`` and ``metrics`` hold depends on the order.

    ``prepare``: counts train_rows, validation_rows, skipped_rows and the like, sequences, parameters (trainable),
    ranks, and notes for the log. ``build``: counts parameters. ``train``: counts examples (the site's training rows,
    FedAvg's n_k),
    tokens (answer tokens trained on), steps; metrics train_loss, tokens_per_second, seconds, learning_rate,
    gpu_memory_bytes (0 without a GPU). ``evaluate``: metrics loss, perplexity, exact_match, reward_accuracy as the plan
    wants (none of those without rows to measure on), seconds; counts examples and tokens (preferences: pairs) behind
    the loss, answers behind exact_match.
    ``account``: metrics epsilon.
    """

    kind: Literal["finished"] = "finished"
    counts: dict[str, int] = {}
    metrics: dict[str, float] = {}
    notes: tuple[str, ...] = ()
    model_digest: str = ""
    """``train``, of a method whose sites rebuild the model: hexadecimal, ``LocalRule.model_digest``."""


class GaveUp(Message):
    """The order can not be done. ``reason`` is a key of ``fsllm_common.errors.REASONS``."""

    kind: Literal["gave_up"] = "gave_up"
    reason: str
    message: str
    cure: str | None = None


Report = Annotated[Here | Advanced | Finished | GaveUp, Field(discriminator="kind")]

order_lines: TypeAdapter[Order] = TypeAdapter(Order)
report_lines: TypeAdapter[Report] = TypeAdapter(Report)
