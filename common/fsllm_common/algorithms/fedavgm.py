"""FedAvgM (Hsu et al. 2019, arXiv 1909.06335): momentum at the server.

v <- beta v + mean delta; x <- x + rate v. With Nesterov's correction x <- x + rate (mean delta + beta v).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from fsllm_common.algorithms.algorithm import Block
from fsllm_common.algorithms.fedavg import FedAvg
from fsllm_common.algorithms.local_rule import Parameters

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


class MomentumParameters(Parameters):
    """FedAvgM's own."""

    momentum: float = Field(default=0.9, ge=0, lt=1, description="beta.")
    nesterov: bool = Field(default=False, description="Step to where the momentum will be.")


class FedAvgM(FedAvg):
    """The mean delta, with the momentum of those before."""

    name: ClassVar[str] = "fedavgm"
    parameters_type = MomentumParameters
    parameters: MomentumParameters

    def state(self) -> Mapping[str, float]:
        """Return the velocity v, which begins with 0."""
        return {"velocity": 0.0}

    def apply(self, block: Block) -> npt.NDArray[np.float32]:
        """Return the base moved along the velocity."""
        velocity, beta = block.state["velocity"], block.base.dtype.type(self.parameters.momentum)
        velocity *= beta
        velocity += block.mean
        step = block.mean + beta * velocity if self.parameters.nesterov else velocity
        return block.base + self.rate(block) * step
