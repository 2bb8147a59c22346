"""FedAvg (McMahan et al. 2017, arXiv 1602.05629), on deltas: x <- x + rate x sum_k p_k delta_k.

The weighting decides p_k: by examples (the paper's), by answer tokens, uniform, or examples capped so that no site
drowns the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from fsllm_common.algorithms.algorithm import Algorithm, Block, Update

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


class FedAvg(Algorithm):
    """The weighted mean of the deltas, added to the base."""

    name: ClassVar[str] = "fedavg"

    def weigh(self, updates: Sequence[Update]) -> list[float]:
        """Return p_k by the plan's weighting. An update that counts for nothing (0 examples) still counts for 1."""
        algorithm = self.plan.algorithm
        match algorithm.weighting:
            case "examples":
                raw = [u.examples for u in updates]
            case "tokens":
                raw = [u.tokens for u in updates]
            case "capped":
                raw = [min(u.examples, algorithm.weight_cap) for u in updates]
            case "uniform":
                raw = [1 for _ in updates]
        raw = [max(1, w) for w in raw]
        total = sum(raw)
        return [w / total for w in raw]

    def apply(self, block: Block) -> npt.NDArray[np.float32]:
        """Return base + server_learning_rate x mean."""
        return block.base + self.rate(block) * block.mean

    def rate(self, block: Block) -> np.float32:
        """Return the server's learning rate as the blocks' type."""
        return block.base.dtype.type(self.learning_rate(self.plan))
