"""Krum (Blanchard et al. 2017, arXiv 1703.02757): the one update that is closest to its K - f - 2 closest others.

Closest in the sum of squared distances between whole updates. It needs K > 2 f + 2. See ``robust`` for what distances
mean where LoRA trains both factors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from fsllm_common.algorithms.algorithm import Update
from fsllm_common.algorithms.robust import ByzantineParameters, Robust

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


class Krum(Robust):
    """The update with the smallest score."""

    name: ClassVar[str] = "krum"
    parameters_type = ByzantineParameters
    parameters: ByzantineParameters
    needs_products = True

    def least_updates(self) -> int:
        """Return 2 f + 3."""
        return 2 * self.parameters.byzantine + 3

    def weigh_by_products(self, updates: Sequence[Update], products: npt.NDArray[np.float64]) -> list[float]:
        """Return equal shares for those with the smallest scores, and 0 for the others."""
        from fsllm_common.algorithms import geometry

        squared = geometry.squared_distances(products)
        ranked = geometry.by_krum(squared, len(updates) - self.parameters.byzantine - 2)
        return geometry.only(ranked[: self.chosen(len(updates))], len(updates))

    def chosen(self, updates: int) -> int:
        """Return how many of so many updates are taken."""
        return 1
