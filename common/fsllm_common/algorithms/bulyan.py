"""Bulyan (El Mhamdi et al. 2018, arXiv 1802.07927): theta = K - 2 f updates by repeated Krum, then their middle.

Krum's choice is taken out and Krum is asked again of those that remain, theta times. Each coordinate is then the mean
of the theta - 2 f selected values that are nearest to their median. It needs K >= 4 f + 3. Of two values that are
equally near, the smaller counts. The last choices may be among fewer than f + 3 updates, of whose distances Krum would
count none; there it counts one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from fsllm_common.algorithms.algorithm import Update
from fsllm_common.algorithms.median import middle
from fsllm_common.algorithms.robust import ByzantineParameters, Robust
from fsllm_common.algorithms.trimmed_mean import mean

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


class Bulyan(Robust):
    """Repeated Krum, then each coordinate's values around their median."""

    name: ClassVar[str] = "bulyan"
    parameters_type = ByzantineParameters
    parameters: ByzantineParameters
    coordinatewise = True
    needs_products = True
    needs_rows = True

    def least_updates(self) -> int:
        """Return 4 f + 3."""
        return 4 * self.parameters.byzantine + 3

    def weigh_by_products(self, updates: Sequence[Update], products: npt.NDArray[np.float64]) -> list[float]:
        """Return equal shares for the selected updates, and 0 for the others."""
        from fsllm_common.algorithms import geometry

        squared = geometry.squared_distances(products)
        remaining = list(range(len(updates)))
        selected = []
        for _ in range(len(updates) - 2 * self.parameters.byzantine):
            neighbours = max(1, len(remaining) - self.parameters.byzantine - 2)
            best = geometry.by_krum(squared[remaining][:, remaining], neighbours)[0]
            selected.append(remaining.pop(best))
        return geometry.only(selected, len(updates))

    def combine(self, rows: npt.NDArray[np.float32], shares: Sequence[float]) -> npt.NDArray[np.float32]:
        """Return the means of the values around the medians."""
        rows.sort(axis=0)
        center = middle(rows)
        count = len(rows) - 2 * self.parameters.byzantine
        # Sorted, the nearest stand beside each other: move on as long as that gains a nearer value than it loses.
        best = mean(rows[:count])
        for first in range(len(rows) - count):
            nearer = rows[first + count] - center < center - rows[first]
            best[nearer] = mean(rows[first + 1 : first + 1 + count])[nearer]
        return best
