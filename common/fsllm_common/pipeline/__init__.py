"""The ordered stages that a delta passes before it leaves a site. One file a stage, both halves in it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from fsllm_common.errors import PlanInvalid
from fsllm_common.pipeline.clip import ClipStage
from fsllm_common.pipeline.noise import NoiseStage
from fsllm_common.pipeline.stage import Facts, Stage

if TYPE_CHECKING:
    from fsllm_common.pipeline.stage import Arrays
    from fsllm_common.plan.schema import Clip, Plan

__all__ = ["ClipStage", "Facts", "NoiseStage", "Stage", "apply_client", "build", "largest_norm"]

# How much rounding to the wire's type can add to a norm: relative (half a unit in the last place), and for a value that
# float16 holds only as a subnormal, absolute.
_RELATIVE: Final = {"fp32": 2.0**-20, "bf16": 2.0**-8, "fp16": 2.0**-10}
_ABSOLUTE: Final = {"fp32": 0.0, "bf16": 0.0, "fp16": 2.0**-25}


def build(plan: Plan) -> list[Stage]:
    """Return the plan's stages in their order.

    Raises:
        PlanInvalid: Noise without a clip before it (a checked plan has none such).

    """
    stages: list[Stage] = []
    clip: Clip | None = None
    for config in plan.pipeline:
        match config.stage:
            case "clip":
                clip = config
                stages.append(ClipStage(config))
            case "noise":
                if clip is None:
                    raise PlanInvalid("pipeline: noise without a clip before it")
                stages.append(NoiseStage(config, clip))
    return stages


def apply_client(stages: Sequence[Stage], delta: Arrays) -> tuple[Arrays, Facts]:
    """Pass a delta through the stages, at the site.

    Args:
        stages: From ``build``.
        delta: float32 arrays by name. Owned by the pipeline from now on: they are changed in place.

    Returns:
        The same arrays, and what was done to them.

    Raises:
        FsllmError: NOT_FINITE.

    """
    facts = Facts()
    for stage in stages:
        stage.client(delta, facts)
    return delta, facts


def largest_norm(plan: Plan, parameters: int) -> float | None:
    """Return the largest L2 norm that the server accepts of an update, from the stages and wire.max_update_norm.

    Rounding to the wire's element type is allowed for. None when the plan sets no bound.
    """
    norm = math.inf
    for stage in build(plan):
        norm = stage.bound(norm, parameters)
    kind = plan.wire.element_type
    norm = norm * (1 + _RELATIVE[kind]) + _ABSOLUTE[kind] * math.sqrt(parameters)
    if plan.wire.max_update_norm is not None:
        norm = min(norm, plan.wire.max_update_norm)
    return norm if math.isfinite(norm) else None
