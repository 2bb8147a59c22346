"""FedYogi (Reddi et al. 2021, arXiv 2003.00295): v <- v - (1 - beta2) d^2 sign(v - d^2), which forgets slowly."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from fsllm_common.algorithms.adaptive import Adaptive, AdaptiveParameters

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


class YogiParameters(AdaptiveParameters):
    """FedYogi's own."""

    beta2: float = Field(default=0.99, ge=0, lt=1, description="Of the second moment.")


class FedYogi(Adaptive):
    """Adam whose second moment changes by no more than the square."""

    name: ClassVar[str] = "fedyogi"
    parameters_type = YogiParameters
    parameters: YogiParameters

    def advance(self, second: npt.NDArray[np.float32], square: npt.NDArray[np.float32]) -> None:
        """Move towards the square by a share of the square."""
        import numpy as np

        part = (second.dtype.type(1) - second.dtype.type(self.parameters.beta2)) * square
        second -= part * np.sign(second - square)
