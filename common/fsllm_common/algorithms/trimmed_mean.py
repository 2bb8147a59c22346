"""Trimmed mean (Yin et al. 2018, arXiv 1803.01498): the mean without the floor(trim K) highest and lowest values.

Of each coordinate by itself. It withstands as many updates as it drops on one side, so a round needs so many that it
drops one at all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from fsllm_common.algorithms.robust import Robust, RobustParameters

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


class TrimmedMeanParameters(RobustParameters):
    """The trimmed mean's own."""

    trim: float = Field(default=0.2, gt=0, lt=0.5, description="beta: the share of the updates to drop on each side.")

    @property
    def fraction(self) -> Fraction:
        """``trim`` as it was written: 0.29 x 100 are 29, which floating point makes a little less."""
        return Fraction(repr(self.trim))


class TrimmedMean(Robust):
    """The mean of each coordinate's values that are neither among the largest nor among the smallest."""

    name: ClassVar[str] = "trimmed-mean"
    parameters_type = TrimmedMeanParameters
    parameters: TrimmedMeanParameters
    coordinatewise = True
    needs_rows = True

    def least_updates(self) -> int:
        """Return from how many updates one is dropped on each side."""
        return math.ceil(1 / self.parameters.fraction)

    def combine(self, rows: npt.NDArray[np.float32], shares: Sequence[float]) -> npt.NDArray[np.float32]:
        """Return the trimmed means."""
        drop = math.floor(self.parameters.fraction * len(rows))
        rows.sort(axis=0)
        return mean(rows[drop : len(rows) - drop])


def mean(rows: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Return (elements,) the means, adding one row after the other."""
    total: npt.NDArray[np.float32] = rows[0].copy()
    for row in rows[1:]:
        total += row
    total /= total.dtype.type(len(rows))
    return total
