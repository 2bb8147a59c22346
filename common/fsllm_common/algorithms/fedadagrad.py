"""FedAdagrad (Reddi et al. 2021, arXiv 2003.00295): v <- v + d^2, and no momentum unless asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from fsllm_common.algorithms.adaptive import Adaptive, AdaptiveParameters

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


class AdagradParameters(AdaptiveParameters):
    """FedAdagrad's own."""

    beta1: float = Field(default=0.0, ge=0, lt=1, description="Of the first moment; the paper has none.")


class FedAdagrad(Adaptive):
    """Steps that only become shorter."""

    name: ClassVar[str] = "fedadagrad"
    parameters_type = AdagradParameters

    def advance(self, second: npt.NDArray[np.float32], square: npt.NDArray[np.float32]) -> None:
        """Add the square."""
        second += square
