"""Clip: scale the delta down to a norm, so that no site can change the result by more.

Client half: delta <- delta x min(1, C / |delta|), one L2 norm over all tensors, computed in float64. Server half: where
no noise follows, an update with a larger norm is refused.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

from fsllm_common.errors import UpdateRejected
from fsllm_common.pipeline.stage import Facts, Stage

if TYPE_CHECKING:
    from fsllm_common.pipeline.stage import Arrays
    from fsllm_common.plan.schema import Clip

# Rounding the factor and each product to float32 can add 2^-23 in all; so scaled, the norm never exceeds C.
_MARGIN = 1 - 2**-22


class ClipStage(Stage):
    """Clip to a fixed norm."""

    name: ClassVar[str] = "clip"

    def __init__(self, clip: Clip) -> None:
        self.norm = clip.norm

    def client(self, delta: Arrays, facts: Facts) -> None:
        """Scale down when the norm is larger; else leave every bit as it is."""
        from fsllm_common.tensors.arrays import norm

        measured = norm(delta)
        if not math.isfinite(measured):
            raise UpdateRejected("NOT_FINITE", "The delta holds NaN or Inf")
        facts.norm = measured
        facts.clip_norm = self.norm
        facts.clipped = measured > self.norm
        if facts.clipped:
            factor = self.norm / measured * _MARGIN
            for array in delta.values():
                array *= factor

    def bound(self, norm: float, parameters: int) -> float:
        """Return the clip's norm, or what came in when that is less."""
        return min(norm, self.norm)
