"""Coordinate-wise median (Yin et al. 2018, arXiv 1803.01498): x <- x + rate x the median of the deltas' values.

For an even number of updates it is the mean of the two values in the middle. It withstands fewer than half of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from fsllm_common.algorithms.robust import Robust

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


class Median(Robust):
    """The middle of each coordinate's values."""

    name: ClassVar[str] = "median"
    coordinatewise = True
    needs_rows = True

    def least_updates(self) -> int:
        """Return 3: of two neither can be told from the other."""
        return 3

    def combine(self, rows: npt.NDArray[np.float32], shares: Sequence[float]) -> npt.NDArray[np.float32]:
        """Return the medians."""
        rows.sort(axis=0)
        return middle(rows)


def middle(ordered: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Return (elements,) the medians of rows whose columns are sorted."""
    half = len(ordered) // 2
    median: npt.NDArray[np.float32] = ordered[half]
    if len(ordered) % 2 == 0:
        median = (ordered[half - 1] + median) * ordered.dtype.type(0.5)
    return median
