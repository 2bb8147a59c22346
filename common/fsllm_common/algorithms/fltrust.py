"""FLTrust (Cao et al. 2020, arXiv 2012.13995): updates count as far as they point where a trusted one points.

The trusted update delta_0 is an evaluator's, trained on data that the federation itself has chosen. With
TS_k = max(0, cos(delta_k, delta_0)) the step is sum_k TS_k |delta_0| / |delta_k| delta_k / sum_k TS_k: every update is
as long as the trusted one, which does not count itself. It withstands any number of bad updates. When none points that
way, nothing changes. Of several trusted updates the mean is taken.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from fsllm_common.algorithms.algorithm import Update
from fsllm_common.algorithms.robust import Robust
from fsllm_common.errors import FsllmError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


class FLTrust(Robust):
    """Trust by direction, relative to an evaluator's update."""

    name: ClassVar[str] = "fltrust"
    needs_products = True
    needs_trusted = True

    def least_updates(self) -> int:
        """Return 2: the trusted one and one more."""
        return 2

    def weigh_by_products(self, updates: Sequence[Update], products: npt.NDArray[np.float64]) -> list[float]:
        """Return TS_k |delta_0| / |delta_k| / sum_k TS_k, and 0 for the trusted.

        Raises:
            FsllmError: TOO_FEW_UPDATES: none is trusted.

        """
        trusted = [i for i, update in enumerate(updates) if update.trusted]
        if not trusted:
            message = "fltrust compares the updates with an evaluator's, and the round has none"
            cure = "Attach an evaluator with data of its own, and submit the plan again."
            raise FsllmError("TOO_FEW_UPDATES", message, cure=cure)
        rows = products.tolist()
        root = math.sqrt(math.fsum(rows[i][j] for i in trusted for j in trusted)) / len(trusted)
        scores, scales = [], []
        for i, update in enumerate(updates):
            norm = math.sqrt(rows[i][i])
            along = math.fsum(rows[i][j] for j in trusted) / len(trusted)
            counts = not update.trusted and norm > 0 and root > 0
            scores.append(max(0.0, along / (norm * root)) if counts else 0.0)
            scales.append(root / norm if counts else 0.0)
        total = math.fsum(scores)
        return [score * scale / total if total else 0.0 for score, scale in zip(scores, scales, strict=True)]
