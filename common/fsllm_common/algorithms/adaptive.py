"""Adaptive federated optimization (Reddi et al. 2021, arXiv 2003.00295): what FedAdagrad, FedAdam and FedYogi share.

With d the mean delta: m <- beta1 m + (1 - beta1) d; v <- as the method says, from d^2; and
x <- x + rate m / (sqrt(v) + tau). As in the paper's algorithm 2, v begins with tau^2 and there is no bias correction.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

import pydantic
from pydantic import Field

from fsllm_common.algorithms.algorithm import Block
from fsllm_common.algorithms.fedavg import FedAvg
from fsllm_common.algorithms.local_rule import Parameters

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


class AdaptiveParameters(Parameters):
    """Of all three."""

    beta1: float = Field(default=0.9, ge=0, lt=1, description="Of the first moment.")
    tau: pydantic.PositiveFloat = Field(default=1e-3, description="How adaptive: the smaller, the more.")


class Adaptive(FedAvg):
    """A step whose length is each coordinate's own."""

    parameters_type = AdaptiveParameters
    parameters: AdaptiveParameters
    server_learning_rate: ClassVar[float] = 0.01

    def state(self) -> Mapping[str, float]:
        """Return the moments."""
        return {"first": 0.0, "second": self.parameters.tau**2}

    def apply(self, block: Block) -> npt.NDArray[np.float32]:
        """Return the base moved along the first moment, divided by the root of the second."""
        real = block.base.dtype.type
        first, second = block.state["first"], block.state["second"]
        beta = real(self.parameters.beta1)
        first *= beta
        first += (real(1) - beta) * block.mean
        self.advance(second, block.mean * block.mean)
        return block.base + self.rate(block) * self.direction(block, first, second)

    @abstractmethod
    def advance(self, second: npt.NDArray[np.float32], square: npt.NDArray[np.float32]) -> None:
        """Bring the second moment, in place, from the last round to this one. ``square``: of the mean delta."""

    def direction(
        self, block: Block, first: npt.NDArray[np.float32], second: npt.NDArray[np.float32]
    ) -> npt.NDArray[np.float32]:
        """Return what is multiplied by the learning rate."""
        root: npt.NDArray[np.float32] = second**0.5
        return first / (root + block.base.dtype.type(self.parameters.tau))
