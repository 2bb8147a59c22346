"""Norm bounding (Sun et al. 2019, arXiv 1911.07963): the mean of delta_k min(1, M / |delta_k|).

M is the plan's; or the median of the round's own norms, which follows them as training settles and which fewer than
half of the updates can not move beyond the others' norms; or the running median, of the norms in this round and in
those before it, which a round with many bad updates does not move far. It is that of the last 1,024 updates.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Final, Literal

from pydantic import Field, PositiveFloat

from fsllm_common.algorithms.algorithm import Update
from fsllm_common.algorithms.robust import Robust, RobustParameters

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


_REMEMBERED: Final = 1024


class NormBoundParameters(RobustParameters):
    """Norm bounding's own."""

    bound: PositiveFloat | Literal["median", "running-median"] = Field(
        default="median",
        description="M: the largest norm that an update keeps; median: of the round's norms; running-median: of those "
        "of the rounds before, too.",
    )


class NormBound(Robust):
    """The mean of updates none of which is longer than the bound."""

    name: ClassVar[str] = "norm-bound"
    parameters_type = NormBoundParameters
    parameters: NormBoundParameters
    needs_products = True

    def remembers(self) -> int:
        """Return how many updates' norms a running median is of; 0 stands for one that there has not been."""
        return _REMEMBERED if self.parameters.bound == "running-median" else 0

    def weigh_by_products(self, updates: Sequence[Update], products: npt.NDArray[np.float64]) -> list[float]:
        """Return 1 / K, less for the longer ones."""
        from fsllm_common.algorithms import geometry

        norms = geometry.norms(products)
        match self.parameters.bound:
            case "median":
                bound = geometry.median(norms)
            case "running-median":
                self.memory = [*self.memory, *norms][-_REMEMBERED:]
                bound = geometry.median([norm for norm in self.memory if norm > 0] or norms)
            case fixed:
                bound = fixed
        return [share / len(norms) for share in geometry.shrinkage(norms, bound)]
