"""A run's plan: everything that the sites and the server must agree on before the first round.

A plan is a YAML, TOML or JSON file with the keys below. Unknown keys are refused. Every key but ``name`` and ``model``
has a default. What a site must decide alone (where models lie, which noise is the least, its GPUs) is in the site's
policy and settings, not here.
"""

from typing import Annotated, Final, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, field_validator, model_validator

from fsllm_common.section import Section

Fraction = Annotated[float, Field(gt=0, le=1)]
Seconds = Annotated[float, Field(gt=0)]


Quantization = Literal["none", "nf4", "int8"]

AdapterKind = Literal["lora", "dora", "rslora", "lora-xs", "vera", "oft", "ia3", "prefix", "prompt", "p-tuning"]

UNFIT_KINDS: Final = {
    "adalora": "each site would prune ranks of its own, so that a mean mixes ranks that some have given up: say lora, "
    "with a rank that the wire can bear"
}
"""Kinds of adapter that PEFT knows and a federation can not use, each with its reason."""


class Model(Section):
    """Which base model the sites fine-tune. The server never sees it."""

    name: str = Field(
        min_length=1,
        description="The model's name in each site's policy ([models] name = folder). 'embedded' is the project's own "
        "tiny model; 'synthetic' stands for no model at all and goes with algorithm.name: noop.",
    )
    digest: str | None = Field(
        default=None,
        pattern=r"^[0-9a-f]{64}$",
        description="BLAKE3 of the model's weights as `fsllm-client model digest FOLDER` prints it; a site whose "
        "folder differs declines. Unset: not checked.",
    )
    quantization: Quantization = Field(
        default="none",
        description="How sites hold the base model's linear layers while they train (QLoRA), by bitsandbytes. It "
        "saves memory; what travels is the same.",
    )


class Adapter(Section):
    """The trainable part that travels: a PEFT adapter."""

    kind: AdapterKind = Field(
        default="lora",
        description="lora, dora (with magnitudes), rslora (scale alpha / sqrt(rank)), lora-xs (rank x rank between "
        "fixed factors of each weight), vera (scales of shared random projections), oft (rotations), ia3 (scales), "
        "prefix, prompt, p-tuning (virtual tokens).",
    )
    rank: PositiveInt = Field(
        default=8, description="Rank of lora, dora, rslora, lora-xs (16 to 64 are usual), vera (64 to 1024)."
    )
    ranks: tuple[PositiveInt, ...] = Field(
        default=(),
        description="Smaller ranks that sites may have instead, by their policy's maximum_rank: for methods that can "
        "aggregate different ones.",
    )
    alpha: PositiveFloat = Field(default=16, description="LoRA's alpha; the scale is alpha / rank.")
    dropout: float = Field(default=0.0, ge=0, lt=1)
    targets: Literal["all-linear"] | tuple[str, ...] = Field(
        default="all-linear", description="Module names to adapt, e.g. [q_proj, v_proj]."
    )
    block_size: PositiveInt = Field(
        default=32, description="Width of oft's rotations; must divide the inputs of every adapted layer."
    )
    virtual_tokens: PositiveInt = Field(default=16, description="Length of prefix, prompt and p-tuning.")
    encoder_hidden_size: PositiveInt = Field(default=128, description="Width of p-tuning's encoder.")

    @field_validator("kind", mode="before")
    @classmethod
    def _refuse_unfit(cls, kind: object) -> object:
        """Say why, where 'unknown' would send its author looking for the right spelling."""
        if isinstance(kind, str) and kind in UNFIT_KINDS:
            raise ValueError(UNFIT_KINDS[kind])
        return kind


class Synthetic(Section):
    """The tensors of a run with ``algorithm.name: noop``, which measures the system without training."""

    tensors: PositiveInt = 64
    mebibytes: PositiveFloat = Field(default=8, description="Total size in float32.")


class Algorithm(Section):
    """How local results become the next global version."""

    name: str = Field(
        default="fedavg",
        description="One of fsllm's methods, which docs/algorithms.md lists, or of another package.",
    )
    parameters: dict[str, bool | int | float | str | None] = Field(
        default_factory=dict, description="The method's own; docs/algorithms.md lists them."
    )
    weighting: Literal["examples", "tokens", "uniform", "capped"] = Field(
        default="examples", description="What an update counts for; capped: examples, at most weight_cap."
    )
    weight_cap: PositiveInt = Field(default=1000, description="For weighting: capped.")
    server_learning_rate: PositiveFloat | None = Field(
        default=None, description="x <- x + rate x step. Unset: the method's, 1 or (fedadam and its like) 0.01."
    )
    synthetic: Synthetic = Synthetic()

    @model_validator(mode="before")
    @classmethod
    def _from_earlier(cls, given: object) -> object:
        """Read plans that were recorded when FedProx's parameter had a key of its own."""
        if isinstance(given, dict) and "proximal_mu" in given:
            given = dict(given)
            own = given.get("parameters", {})
            if (mu := given.pop("proximal_mu")) and isinstance(own, dict):  # what is no section is refused as such
                given["parameters"] = {"mu": mu, **own}
        return given


class Buffer(Section):
    """Asynchronous rounds: no site waits for another."""

    size: PositiveInt = Field(
        description="A version is made of every so many updates, as they come (FedBuff); 1: of each, as in FedAsync."
    )
    max_staleness: int = Field(
        default=20, ge=0, description="An update that started from a version older by more than this is not wanted."
    )
    weight: Literal["polynomial", "hinge", "constant"] = Field(
        default="polynomial",
        description="What staleness t multiplies an update's share by: (1 + t)^-exponent; or 1 up to t = threshold, "
        "1 / (slope (t - threshold) + 1) beyond it; or 1.",
    )
    exponent: PositiveFloat = 0.5
    slope: PositiveFloat = 10.0
    threshold: int = Field(default=4, ge=0)


class Cohort(Section):
    """Who takes part, and how many are enough."""

    sites: tuple[str, ...] | None = Field(default=None, description="Only these sites; unset: every enrolled site.")
    quorum: PositiveInt = Field(default=2, description="The fewest updates that make a round.")
    size: PositiveInt | None = Field(
        default=None, description="Updates wanted a round; unset: from all that are ready."
    )
    over_selection: float = Field(
        default=1.0, ge=1, le=4, description="Ask size x this many sites; the first `size` updates make the round."
    )
    buffer: Buffer | None = Field(
        default=None, description="Asynchronous rounds; unset: each round waits for its cohort, up to its deadline."
    )

    @property
    def updates(self) -> int | None:
        """How many updates make a round; unset: as many sites as are there, at least the quorum."""
        return self.buffer.size if self.buffer is not None else self.size or (len(self.sites) if self.sites else None)


class Timing(Section):
    """When the engine stops waiting. Work that advances is never ended by the idle time."""

    recruit_seconds: Seconds | None = Field(
        default=None, description="How long to wait for a quorum of sites; unset: for ever."
    )
    gather_seconds: Seconds = Field(
        default=2.0,
        description="How long to wait for more sites once a quorum is ready, before the first round; and, before a "
        "cohort is drawn or a version is measured, for those who have just gone.",
    )
    collect_seconds: Seconds | None = Field(
        default=None, description="A round's deadline for updates, when a quorum is enough; unset: none."
    )
    evaluate_seconds: Seconds = Field(default=600, description="A round's deadline for evaluations.")
    idle_seconds: Seconds = Field(
        default=300, description="A site whose steps and bytes have not advanced for so long is dropped from the round."
    )
    failed_rounds: PositiveInt = Field(default=3, description="So many failures in a row pause the run.")


class Train(Section):
    """Local training in one round."""

    steps: PositiveInt | None = Field(default=30, description="Optimizer steps a round; unset: use epochs.")
    epochs: PositiveFloat | None = Field(
        default=None, description="Passes over the site's data a round; needs steps: null."
    )
    batch_size: PositiveInt = Field(default=16, description="Sequences a step, over all ranks and accumulation.")
    micro_batch_size: PositiveInt | None = Field(
        default=None, description="Sequences a forward pass on one rank; the rest is accumulated. Unset: as one pass."
    )
    optimizer: Literal["adamw", "sgd"] = "adamw"
    learning_rate: PositiveFloat = 3e-4
    weight_decay: float = Field(default=0.0, ge=0)
    schedule: Literal["constant", "cosine", "linear"] = Field(
        default="constant", description="Of the learning rate, over the run's rounds; constant within a round."
    )
    warmup_rounds: int = Field(default=0, ge=0)
    final_fraction: float = Field(default=0.1, ge=0, le=1, description="Where cosine and linear end, of learning_rate.")
    max_grad_norm: float = Field(default=1.0, ge=0, description="0: no clipping.")
    precision: Literal["bf16", "fp32"] = "bf16"
    gradient_checkpointing: bool = False
    optimizer_state: Literal["reset", "keep"] = Field(
        default="reset", description="At the start of a round: a fresh optimizer, or the site's last one."
    )


class DeepSpeed(Section):
    """DeepSpeed's part of the plan. A site may put its own JSON in its place (setting ``deepspeed_config``)."""

    zero_stage: Literal[1, 2, 3] = 2
    offload_optimizer: bool = Field(default=True, description="Keep the optimizer on the host: ZeRO-Offload.")
    offload_parameters: bool = Field(default=False, description="Keep the parameters on the host; stage 3 only.")


FieldName = Literal["instruction", "input", "output", "prompt", "completion", "messages", "text", "chosen", "rejected"]


class Data(Section):
    """How a site's rows become training sequences."""

    format: Literal["auto", "instruction", "completion", "chat", "text", "preference"] = Field(
        default="auto",
        description="How a row says what to learn; auto: found out at each site, from the first row of each file. "
        "preference: a prompt, a chosen and a rejected answer; for dpo, and never found out.",
    )
    fields: dict[FieldName, str] = Field(default_factory=dict, description="Our name: the name in the site's files.")
    template: str = Field(
        default="alpaca", description="'tokenizer' for the tokenizer's chat template, or alpaca, plain, chatml, brief."
    )
    max_length: PositiveInt = Field(default=512, description="Tokens a sequence; longer examples are cut at the end.")
    packing: bool = Field(default=True, description="Several examples a sequence, kept apart by attention.")
    validation_fraction: float = Field(default=0.1, ge=0, lt=1, description="Of a site's rows, never trained on.")
    validation_limit: PositiveInt = Field(default=200, description="At most so many validation rows.")


class Clip(Section):
    """Scale the delta down to this norm."""

    stage: Literal["clip"] = "clip"
    norm: PositiveFloat = Field(description="L2 over all tensors.")


class Noise(Section):
    """Add Gaussian noise to a clipped delta: local, client-level differential privacy."""

    stage: Literal["noise"] = "noise"
    multiplier: PositiveFloat = Field(description="Standard deviation a coordinate = multiplier x clip norm.")
    delta: float = Field(default=1e-5, gt=0, lt=1, description="The delta of (epsilon, delta).")


Stage = Annotated[Clip | Noise, Field(discriminator="stage")]


class Wire(Section):
    """What an update and a version look like on the wire."""

    element_type: Literal["fp32", "bf16", "fp16"] = "bf16"
    max_update_norm: PositiveFloat | None = Field(
        default=None, description="The server refuses an update whose L2 norm is larger. Unset: only NaN and Inf."
    )


class Evaluate(Section):
    """What is measured at the end of a round."""

    every: int = Field(default=1, ge=0, description="Rounds between evaluations; 0: never. The last round always is.")
    base: bool = Field(default=True, description="Measure version 0 too: the base model.")
    metrics: tuple[Literal["loss", "perplexity", "exact_match", "reward_accuracy"], ...] = Field(
        default=("loss", "perplexity"),
        description="reward_accuracy, of preference pairs: the share whose chosen answer has gained more on the base "
        "model's probability than the rejected one.",
    )
    limit: PositiveInt = Field(default=200, description="At most so many examples a member.")
    max_new_tokens: PositiveInt = Field(default=32, description="For exact_match, greedy.")
    normalizer: Literal["strip", "lower", "gsm8k", "number"] = Field(
        default="strip", description="Applied to the answer and the reference before they are compared."
    )


class Plan(Section):
    """The whole plan of a run."""

    name: str = Field(pattern=r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$", description="For people; need not be unique.")
    seed: int = Field(default=0, ge=0, lt=2**31)
    rounds: PositiveInt = 10
    model: Model
    adapter: Adapter = Adapter()
    algorithm: Algorithm = Algorithm()
    cohort: Cohort = Cohort()
    timing: Timing = Timing()
    train: Train = Train()
    deepspeed: DeepSpeed = DeepSpeed()
    data: Data = Data()
    pipeline: tuple[Stage, ...] = ()
    wire: Wire = Wire()
    evaluate: Evaluate = Evaluate()

    def with_rank(self, rank: int | None) -> Self:
        """Return the same plan for an adapter of this rank; None: of its own."""
        if rank is None or rank == self.adapter.rank:
            return self
        return self.model_copy(update={"adapter": self.adapter.model_copy(update={"rank": rank, "ranks": ()})})
