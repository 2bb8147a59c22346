"""FedAdam (Reddi et al. 2021, arXiv 2003.00295): v <- beta2 v + (1 - beta2) d^2.

With ``bias_correction`` it is Adam (Kingma and Ba 2015, arXiv 1412.6980) on the mean delta: v begins with 0, and both
moments are divided by what their weights add up to so far.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from fsllm_common.algorithms.adaptive import Adaptive, AdaptiveParameters
from fsllm_common.algorithms.algorithm import Block

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


class AdamParameters(AdaptiveParameters):
    """FedAdam's own."""

    beta2: float = Field(default=0.99, ge=0, lt=1, description="Of the second moment.")
    bias_correction: bool = Field(default=False, description="As in Adam; the federated paper has none.")


class FedAdam(Adaptive):
    """Adam at the server."""

    name: ClassVar[str] = "fedadam"
    parameters_type = AdamParameters
    parameters: AdamParameters

    def state(self) -> Mapping[str, float]:
        """Return the moments; with bias correction both begin with 0."""
        return {"first": 0.0, "second": 0.0} if self.parameters.bias_correction else super().state()

    def advance(self, second: npt.NDArray[np.float32], square: npt.NDArray[np.float32]) -> None:
        """Move towards the square."""
        beta = second.dtype.type(self.parameters.beta2)
        second *= beta
        second += (second.dtype.type(1) - beta) * square

    def direction(
        self, block: Block, first: npt.NDArray[np.float32], second: npt.NDArray[np.float32]
    ) -> npt.NDArray[np.float32]:
        """Return the paper's, of the corrected moments where asked for."""
        if self.parameters.bias_correction:
            real = block.base.dtype.type
            first = first / real(1 - self.parameters.beta1**block.round)
            second = second / real(1 - self.parameters.beta2**block.round)
        return super().direction(block, first, second)
