"""What a plan may not combine, each with its reason.

``REFUSED`` is a table so that docs and tests can walk it. A predicate that is true refuses the plan.
"""

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from fsllm_common.algorithms import algorithm_class, algorithm_names
from fsllm_common.errors import FsllmError, PlanInvalid
from fsllm_common.identity.names import check_name
from fsllm_common.plan.schema import Clip, Noise, Plan
from fsllm_common.tensors.manifest import MAX_TENSORS

TEMPLATES: Final = ("tokenizer", "alpaca", "chatml", "brief", "plain")
PROMPT_KINDS: Final = ("prefix", "prompt", "p-tuning")
SYNTHETIC_MODEL: Final = "synthetic"

FORMAT_FIELDS: Final[dict[str, tuple[str, ...]]] = {
    "instruction": ("instruction", "input", "output"),
    "completion": ("prompt", "completion"),
    "chat": ("messages",),
    "text": ("text",),
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
        "data.template", lambda p: p.data.template not in TEMPLATES, f"unknown template; known: {', '.join(TEMPLATES)}"
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
        lambda p: bool(noises(p)) and p.algorithm.weighting != "uniform",
        "weights by examples or tokens tell every site's exact counts, which the noise does not cover: "
        "say algorithm.weighting: uniform",
    ),
    Combination(
        "pipeline, wire.max_update_norm",
        lambda p: p.wire.max_update_norm is not None and any(c.norm > p.wire.max_update_norm for c in clips(p)),
        "the server would refuse updates that the clip lets through: raise max_update_norm or lower the clip's norm",
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
        raise PlanInvalid(f"algorithm.name: unknown algorithm {plan.algorithm.name!r}; {hint}")
    if reasons := [f"{c.keys}: {c.why}" for c in REFUSED if c.refused(plan)]:
        raise PlanInvalid("; ".join(reasons))
