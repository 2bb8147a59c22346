"""Centred clipping (Karimireddy et al. 2020, arXiv 2012.10333): v <- v + mean_k (delta_k - v) min(1, tau/|delta_k-v|).

The paper iterates this from any v that is not far from the good updates' mean, and its own optimizer takes the last
round's result, so that one iteration is enough. Here v begins with 0, the delta of a site that has learned nothing, in
each round, and there are several iterations: cohorts change between rounds, and then every v is made of this round's
updates, whose inner products are enough. tau is the plan's, or in each iteration the median of the distances from v.
Updates longer than 100 times the median norm and tau count with that length (``geometry.reined_in``): clipped they are
the same. With the median as tau it withstands fewer than half of the updates.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from fsllm_common.algorithms.algorithm import Update
from fsllm_common.algorithms.robust import Robust, RobustParameters

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


class CentredClippingParameters(RobustParameters):
    """Centred clipping's own."""

    radius: PositiveFloat | Literal["median"] = Field(
        default="median", description="tau: how far from v an update counts in full; median: of the distances from v."
    )
    iterations: PositiveInt = Field(default=10, le=10_000, description="Of moving v, in each round.")


class CentredClipping(Robust):
    """Shares by which the sum is the last v."""

    name: ClassVar[str] = "centred-clipping"
    departs = (
        "v begins with 0 in each round and is iterated, where the paper's begins with the last round's: cohorts "
        "change in between"
    )
    parameters_type = CentredClippingParameters
    parameters: CentredClippingParameters
    needs_products = True

    def least_updates(self) -> int:
        """Return 3: of two neither can be told from the other."""
        return 3

    def weigh_by_products(self, updates: Sequence[Update], products: npt.NDArray[np.float64]) -> list[float]:
        """Return the updates' shares in v; the rest of it is 0, where it began."""
        from fsllm_common.algorithms import geometry

        count = len(updates)
        fixed = None if self.parameters.radius == "median" else self.parameters.radius
        products, factors = geometry.reined_in(products, geometry.FAR * (fixed or 0))
        squared = geometry.squared_distances(geometry.with_origin(products))
        shares = [0.0] * count
        for _ in range(self.parameters.iterations):
            away = geometry.distances_from([*shares, 1 - math.fsum(shares)], squared)[:count]
            steps = [step / count for step in geometry.shrinkage(away, fixed or geometry.median(away))]
            stay = 1 - math.fsum(steps)
            shares = [stay * share + step for share, step in zip(shares, steps, strict=True)]
        return [share * factor for share, factor in zip(shares, factors, strict=True)]
