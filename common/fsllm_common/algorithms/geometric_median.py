"""Geometric median (RFA, Pillutla et al. 2019, arXiv 1912.13445): the point closest to all deltas together.

Closest in the sum of the distances, not of their squares, which the mean minimises. Found by the smoothed Weiszfeld
iteration v <- sum_k w_k delta_k / sum_k w_k, w_k = 1 / max(nu, |v - delta_k|), from the mean on. Every v is made of the
updates, so their inner products are enough, and an iteration costs next to nothing. Updates longer than 100 times the
median norm count with that length (``geometry.reined_in``): their direction is all that matters to the point.

It withstands fewer than half of the updates. Where f of K are bad and far away, each iteration multiplies v's distance
from the others by about f / (K - f): 100 iterations come all the way back unless more than 48 % are bad, and leave v
within 100 median norms even then.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field, PositiveFloat, PositiveInt

from fsllm_common.algorithms.algorithm import Update
from fsllm_common.algorithms.robust import Robust, RobustParameters

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


class GeometricMedianParameters(RobustParameters):
    """The geometric median's own."""

    iterations: PositiveInt = Field(default=100, le=10_000, description="Of Weiszfeld's.")
    smoothing: PositiveFloat = Field(default=1e-6, description="nu: distances below it count as this.")


class GeometricMedian(Robust):
    """Shares by which the weighted mean is the geometric median."""

    name: ClassVar[str] = "geometric-median"
    parameters_type = GeometricMedianParameters
    parameters: GeometricMedianParameters
    needs_products = True

    def least_updates(self) -> int:
        """Return 3: of two neither can be told from the other."""
        return 3

    def weigh_by_products(self, updates: Sequence[Update], products: npt.NDArray[np.float64]) -> list[float]:
        """Return the last iteration's w_k / sum_k w_k, times what an update was shortened by."""
        from fsllm_common.algorithms import geometry

        products, factors = geometry.reined_in(products)
        squared = geometry.squared_distances(products)
        shares = self.weigh(updates)
        for _ in range(self.parameters.iterations):
            weights = [1 / max(self.parameters.smoothing, far) for far in geometry.distances_from(shares, squared)]
            total = math.fsum(weights)
            shares = [weight / total for weight in weights]
        return [share * factor for share, factor in zip(shares, factors, strict=True)]
