"""What a plan may not combine, each with its reason.

``REFUSED`` is a table so that docs and tests can walk it. A predicate that is true refuses the plan.
"""

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from pydantic import ValidationError

from fsllm_common.algorithms import ADAPTER, Algorithm, algorithm_class, algorithm_names, changes
from fsllm_common.errors import FsllmError, PlanInvalid
from fsllm_common.identity.names import check_name
from fsllm_common.plan.schema import Clip, Noise, Plan
from fsllm_common.tensors.manifest import MAX_TENSORS

TEMPLATES: Final = ("tokenizer", "alpaca", "chatml", "brief", "plain")
PROMPT_KINDS: Final = ("prefix", "prompt", "p-tuning")
RANKED_KINDS: Final = ("lora", "rslora", "lora-xs")
"""Whose first ranks are an adapter themselves."""
SYNTHETIC_MODEL: Final = "synthetic"
MAX_ROUNDS: Final = 99_999
"""Names of what a round adds have five digits, by which they are sorted."""
MAX_PARTS: Final = 10_000
"""Of a version: each order names them all, of some 60 bytes each, in a message of 4 MiB."""
MULTIPLIERS: Final = (1e-4, 1e4)
"""Least and largest noise: beyond, epsilons and variances are no numbers that mean anything."""

FORMAT_FIELDS: Final[dict[str, tuple[str, ...]]] = {
    "instruction": ("instruction", "input", "output"),
    "completion": ("prompt", "completion"),
    "chat": ("messages",),
    "text": ("text",),
    "preference": ("prompt", "chosen", "rejected"),
}
"""Which of our fields a row of each format has."""


@dataclass(frozen=True, slots=True)
class Combination:
    """One refused combination: the keys it is about, when it is there, and why not."""

    keys: str
    refused: Callable[[Plan], bool]
    why: str


def _stages(plan: Plan) -> list[str]:
    return [stage.stage for stage in plan.pipeline]


def clips(plan: Plan) -> list[Clip]:
    """Return the plan's clips; a checked plan has at most one."""
    return [stage for stage in plan.pipeline if isinstance(stage, Clip)]


def noises(plan: Plan) -> list[Noise]:
    """Return the plan's noises; a checked plan has at most one."""
    return [stage for stage in plan.pipeline if isinstance(stage, Noise)]


def trains(plan: Plan) -> bool:
    """Tell whether the plan's algorithm trains a model."""
    return algorithm_class(plan.algorithm.name).needs_trainer


def method_of(plan: Plan) -> Algorithm | None:
    """Return the plan's algorithm; None when its parameters are wrong, which is told elsewhere."""
    try:
        return algorithm_class(plan.algorithm.name)(plan)
    except ValidationError:
        return None


def _one_schedule(plan: Plan) -> bool:
    """Tell whether every round changes the same parts, by itself: as rounds must that take updates from older ones."""
    if (method := method_of(plan)) is None:
        return True
    moving = {method.moving(round_) for round_ in range(1, min(plan.rounds, 12) + 1)}
    alike = len(moving) == 1 if method.any_version else moving == {(ADAPTER,)}
    return alike and not type(method).needs_layers and not method.needs_trusted


def weighting(plan: Plan) -> str:
    """Return what an update counts for: uniform where the method decides that itself."""
    return "uniform" if algorithm_class(plan.algorithm.name).uniform else plan.algorithm.weighting


def fewest_updates(plan: Plan) -> int:
    """Return of how many updates a version may be made."""
    return plan.cohort.buffer.size if plan.cohort.buffer is not None else plan.cohort.quorum


def _gains_parts(plan: Plan) -> bool:
    """Tell whether each round's version has a part more than the one before."""
    if (method := method_of(plan)) is None:
        return False
    entry = method.base_delta([plan.adapter.rank], [2**40])
    parts = [method.moving(round_) for round_ in range(1, 13)]
    return (entry is not None and not entry.replaces) or len(set(parts)) == len(parts)


def _plain_sgd(plan: Plan) -> bool:
    train = plan.train
    return train.optimizer == "sgd" and train.weight_decay == 0 and train.max_grad_norm == 0


def _learns_preferences(plan: Plan) -> bool:
    return changes(algorithm_class(plan.algorithm.name).local_rule, "pair_loss")


def _preferences(plan: Plan) -> bool:
    return plan.data.format == "preference"


def _sites(plan: Plan) -> int | None:
    return len(plan.cohort.sites) if plan.cohort.sites is not None else None


def _bad_site_name(plan: Plan) -> bool:
    try:
        for site in plan.cohort.sites or ():
            check_name(site)
    except FsllmError:
        return True
    return False


def _foreign_fields(plan: Plan) -> bool:
    """Tell whether data.fields names fields that no one format has together."""
    formats = FORMAT_FIELDS.values() if plan.data.format == "auto" else [FORMAT_FIELDS[plan.data.format]]
    return not any(set(plan.data.fields) <= set(fields) for fields in formats)


REFUSED: Final[tuple[Combination, ...]] = (
    Combination("rounds", lambda p: p.rounds > MAX_ROUNDS, f"at most {MAX_ROUNDS}"),
    Combination(
        "rounds, algorithm.name",
        lambda p: MAX_PARTS < p.rounds <= MAX_ROUNDS and _gains_parts(p),
        f"each round adds a part to this method's version, which may have {MAX_PARTS}: say fewer rounds, or, for a "
        "method with a ledger, algorithm.parameters.ledger_rank",
    ),
    Combination(
        "train.steps, train.epochs",
        lambda p: p.train.steps is not None and p.train.epochs is not None,
        "say one of them: with epochs, set steps: null",
    ),
    Combination(
        "train.steps, train.epochs",
        lambda p: p.train.steps is None and p.train.epochs is None,
        "one of them is needed",
    ),
    Combination(
        "train.micro_batch_size, train.batch_size",
        lambda p: p.train.micro_batch_size is not None and p.train.batch_size % p.train.micro_batch_size != 0,
        "the micro batch must divide the batch",
    ),
    Combination(
        "train.warmup_rounds, rounds",
        lambda p: p.train.warmup_rounds >= p.rounds,
        "the learning rate would never reach its value: warm up for fewer rounds than there are",
    ),
    Combination(
        "deepspeed.offload_parameters, deepspeed.zero_stage",
        lambda p: p.deepspeed.offload_parameters and p.deepspeed.zero_stage != 3,
        "parameters can be offloaded in ZeRO stage 3 only",
    ),
    Combination(
        "model.quantization, deepspeed.zero_stage",
        lambda p: p.model.quantization != "none" and p.deepspeed.zero_stage == 3,
        "stage 3 cuts weights up, which quantised ones do not survive: say zero_stage 2",
    ),
    Combination(
        "algorithm.name, model.name",
        lambda p: not trains(p) and p.model.name != SYNTHETIC_MODEL,
        "this algorithm trains no model: say model.name: synthetic",
    ),
    Combination(
        "algorithm.name, model.name",
        lambda p: trains(p) and p.model.name == SYNTHETIC_MODEL,
        "synthetic stands for no model, and this algorithm trains one: name a model, or say algorithm.name: noop",
    ),
    Combination(
        "algorithm.name, evaluate.metrics",
        lambda p: not trains(p) and "exact_match" in p.evaluate.metrics,
        "without a model there are no answers to compare",
    ),
    Combination(
        "algorithm.synthetic.tensors",
        lambda p: p.algorithm.synthetic.tensors > MAX_TENSORS,
        f"at most {MAX_TENSORS} tensors",
    ),
    Combination(
        "cohort.sites", lambda p: _sites(p) == 0, "an empty list lets nobody take part; leave it out for every site"
    ),
    Combination("cohort.sites", _bad_site_name, "a site's name is 1 to 63 of a-z, 0-9 and '-'"),
    Combination(
        "cohort.sites",
        lambda p: p.cohort.sites is not None and len(set(p.cohort.sites)) != len(p.cohort.sites),
        "a site is named twice",
    ),
    Combination(
        "cohort.quorum, cohort.sites",
        lambda p: (_sites(p) or p.cohort.quorum) < p.cohort.quorum,
        "the quorum is larger than the number of sites and could never be reached",
    ),
    Combination(
        "cohort.size, cohort.quorum",
        lambda p: p.cohort.size is not None and p.cohort.size < p.cohort.quorum,
        "a round would end with fewer updates than its quorum",
    ),
    Combination(
        "cohort.size, cohort.sites",
        lambda p: p.cohort.size is not None and (_sites(p) or p.cohort.size) < p.cohort.size,
        "the size is larger than the number of sites",
    ),
    Combination(
        "cohort.over_selection, cohort.size",
        lambda p: p.cohort.over_selection > 1 and p.cohort.size is None,
        "over-selection is relative to a size: give cohort.size",
    ),
    Combination(
        "cohort.buffer, cohort.size",
        lambda p: p.cohort.buffer is not None and p.cohort.size is not None,
        "asynchronous rounds ask every site that is there, and end with buffer.size updates: leave size out",
    ),
    Combination(
        "cohort.buffer, cohort.quorum",
        lambda p: p.cohort.buffer is not None and p.cohort.buffer.size < p.cohort.quorum,
        "a version would be made of fewer updates than the quorum: lower cohort.quorum to buffer.size",
    ),
    Combination(
        "cohort.buffer, cohort.sites",
        lambda p: p.cohort.buffer is not None and (_sites(p) or p.cohort.buffer.size) < p.cohort.buffer.size,
        "each site counts once a version, and fewer are named than the buffer takes",
    ),
    Combination(
        "cohort.buffer, algorithm.name",
        lambda p: p.cohort.buffer is not None and not _one_schedule(p),
        "this method's rounds build on each other, so that an update of an older round means nothing in a later one: "
        "leave cohort.buffer out",
    ),
    Combination(
        "algorithm.name, adapter.kind",
        lambda p: (
            (method := method_of(p)) is not None and p.adapter.kind not in (method.adapter_kinds or p.adapter.kind)
        ),
        "this method is about the factors of other kinds of adapter: docs/algorithms.md says which it goes with",
    ),
    Combination(
        "adapter.ranks, algorithm.name",
        lambda p: bool(p.adapter.ranks) and ((method := method_of(p)) is None or not method.any_rank),
        "this method puts tensors of one shape together: leave ranks out, or take one of those about LoRA's factors "
        "(docs/algorithms.md, the column ranks)",
    ),
    Combination(
        "adapter.ranks, adapter.kind",
        lambda p: bool(p.adapter.ranks) and p.adapter.kind not in RANKED_KINDS,
        "only these kinds can be cut to a smaller rank: lora, rslora, lora-xs (DoRA's magnitudes are of one product)",
    ),
    Combination(
        "adapter.ranks, cohort.buffer",
        lambda p: bool(p.adapter.ranks) and p.cohort.buffer is not None,
        "adapters of different ranks are put together anew in each round, from the version that all have started from: "
        "leave one of the two out",
    ),
    Combination(
        "adapter.ranks, adapter.rank",
        lambda p: (
            any(rank >= p.adapter.rank for rank in p.adapter.ranks) or len(set(p.adapter.ranks)) < len(p.adapter.ranks)
        ),
        "ranks are those smaller than rank, each once",
    ),
    Combination(
        "adapter.targets, adapter.kind",
        lambda p: p.adapter.kind in PROMPT_KINDS and p.adapter.targets != "all-linear",
        "this kind adapts no modules: leave targets out",
    ),
    Combination(
        "adapter.targets",
        lambda p: len(p.adapter.targets) == 0,
        "an empty list adapts nothing; say all-linear or names",
    ),
    Combination(
        "data.packing, adapter.kind",
        lambda p: p.data.packing and p.adapter.kind in PROMPT_KINDS,
        "virtual tokens stand before a whole sequence, so that packed examples would share them: say packing: false",
    ),
    Combination(
        "train.gradient_checkpointing, adapter.kind",
        lambda p: p.train.gradient_checkpointing and p.adapter.kind == "prefix",
        "checkpointing drops the cache that a prefix is, so that nothing would be trained: say "
        "gradient_checkpointing: false",
    ),
    Combination(
        "algorithm.name, data.format",
        lambda p: _learns_preferences(p) and not _preferences(p),
        "this algorithm learns from pairs of a chosen and a rejected answer: say data.format: preference",
    ),
    Combination(
        "data.format, algorithm.name",
        lambda p: _preferences(p) and not _learns_preferences(p),
        "only an algorithm with a loss of its own learns from preferences: say algorithm.name: dpo",
    ),
    Combination(
        "data.packing, data.format",
        lambda p: _preferences(p) and p.data.packing,
        "a preference is two sequences, and each has to be told from all others: say packing: false",
    ),
    Combination(
        "evaluate.metrics, data.format",
        lambda p: _preferences(p) and not set(p.evaluate.metrics) <= {"loss", "reward_accuracy"},
        "of preferences the method's own loss and the reward's accuracy can be measured: say metrics: [loss, "
        "reward_accuracy]",
    ),
    Combination(
        "evaluate.metrics, data.format",
        lambda p: not _preferences(p) and "reward_accuracy" in p.evaluate.metrics,
        "reward_accuracy compares a chosen answer with a rejected one, and these rows have none",
    ),
    Combination(
        "data.template", lambda p: p.data.template not in TEMPLATES, f"unknown template; known: {', '.join(TEMPLATES)}"
    ),
    Combination(
        "evaluate.metrics",
        lambda p: len(set(p.evaluate.metrics)) != (len(p.evaluate.metrics) or min(1, p.evaluate.every)),
        "name one or more, such as loss, and each once",
    ),
    Combination("data.fields, data.format", _foreign_fields, "these fields do not belong to one format of rows"),
    Combination(
        "data.format, evaluate.metrics",
        lambda p: p.data.format == "text" and "exact_match" in p.evaluate.metrics,
        "plain text has no answers to compare",
    ),
    Combination("pipeline", lambda p: len(clips(p)) > 1, "clip may stand there once; the smaller norm decides anyway"),
    Combination("pipeline", lambda p: len(noises(p)) > 1, "noise may stand there once: add up the variances"),
    Combination(
        "pipeline",
        lambda p: bool(noises(p)) and not clips(p),
        "noise without a clip gives no privacy: nothing bounds what one site can change. Put a clip before it",
    ),
    Combination(
        "pipeline",
        lambda p: _stages(p) == ["noise", "clip"],
        "clip must come before noise, whose size is relative to the clip's norm",
    ),
    Combination(
        "pipeline, algorithm.weighting",
        lambda p: bool(noises(p)) and weighting(p) != "uniform",
        "weights by examples or tokens tell every site's exact counts, which the noise does not cover: "
        "say algorithm.weighting: uniform",
    ),
    Combination(
        "pipeline, train.epochs",
        lambda p: bool(noises(p)) and p.train.epochs is not None,
        "the steps of so many passes tell how many rows a site has, which the noise does not cover: say train.steps",
    ),
    Combination(
        "pipeline",
        lambda p: any(not MULTIPLIERS[0] <= noise.multiplier <= MULTIPLIERS[1] for noise in noises(p)),
        f"a noise's multiplier is {MULTIPLIERS[0]:g} to {MULTIPLIERS[1]:g}: less hides nothing, more leaves nothing",
    ),
    Combination(
        "pipeline, wire.max_update_norm",
        lambda p: p.wire.max_update_norm is not None and any(c.norm > p.wire.max_update_norm for c in clips(p)),
        "the server would refuse updates that the clip lets through: raise max_update_norm or lower the clip's norm",
    ),
    Combination(
        "cohort.quorum, cohort.buffer, algorithm.parameters",
        lambda p: (method := method_of(p)) is not None and fewest_updates(p) < method.least_updates(),
        "a round of so few updates could not withstand bad ones: krum and multi-krum need 2 byzantine + 3 (multi-krum "
        "also byzantine + selected), bulyan 4 byzantine + 3, trimmed-mean 1 / trim, median, geometric-median and "
        "centred-clipping 3, fltrust 2: raise the quorum, or the buffer's size",
    ),
    Combination(
        "algorithm.name, train.optimizer, train.weight_decay, train.max_grad_norm",
        lambda p: (method := method_of(p)) is not None and method.needs_plain_sgd and not _plain_sgd(p),
        "fednova, pfedme, apfl, fedmezo, fedkseed, and scaffold's estimate: steps are right for plain gradient steps "
        "only: say optimizer: sgd, weight_decay: 0 and max_grad_norm: 0; or, for scaffold, estimate: gradient",
    ),
    Combination(
        "algorithm.name, train.optimizer_state",
        lambda p: (
            p.train.optimizer_state == "keep"
            and (method := method_of(p)) is not None
            and changes(method.rule(), "turns")
        ),
        "this method trains in turns or by steps of its own, each turn with a fresh optimizer: say optimizer_state: "
        "reset",
    ),
    Combination(
        "algorithm.name, algorithm.weighting",
        lambda p: "weighting" in p.algorithm.model_fields_set and p.algorithm.weighting != weighting(p),
        "this method decides itself what an update counts for, whatever a site says of its data: leave weighting out",
    ),
    Combination(
        "algorithm.name, algorithm.server_learning_rate",
        lambda p: (
            p.algorithm.server_learning_rate not in (None, 1.0)
            and (method := method_of(p)) is not None
            and method.needs_layers
        ),
        "this method makes each module anew from what the sites have trained, and takes no step from the last version: "
        "leave the rate out",
    ),
)


def refuse_combinations(plan: Plan) -> None:
    """Refuse a plan whose keys do not go together, or whose algorithm is not installed.

    Raises:
        PlanInvalid: With the keys and the reason of each refusal.

    """
    names = algorithm_names()
    if plan.algorithm.name not in names:
        near = difflib.get_close_matches(plan.algorithm.name, names, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"installed: {', '.join(names)}"
        raise PlanInvalid(
            f"algorithm.name: unknown algorithm {plan.algorithm.name!r}; {hint}",
            cure="docs/plans.md lists all keys. A method of another package has to be installed on this host, too.",
        )
    reasons = [f"{c.keys}: {c.why}" for c in REFUSED if c.refused(plan)]
    if (method := method_of(plan)) is not None:
        reasons += [f"{refusal.keys}: {refusal.why}" for refusal in method.refuses if refusal.when(method)]
    if reasons:
        raise PlanInvalid("; ".join(reasons))
