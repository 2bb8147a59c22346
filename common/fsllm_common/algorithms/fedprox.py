"""FedProx (Li et al. 2020, arXiv 1812.06127): FedAvg whose local loss has mu/2 |y - x|^2 added.

The term is added to the gradient, as mu (y - x), rather than to the loss: it is the same step, costs no graph, and
works under every ZeRO stage (under ZeRO-3 a loss can not even see the parameters).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field, PositiveFloat

from fsllm_common.algorithms.fedavg import FedAvg
from fsllm_common.algorithms.interface import LocalRule, Parameters

if TYPE_CHECKING:
    import torch

    from fsllm_common.plan import Plan


class ProximalParameters(Parameters):
    """FedProx's own."""

    mu: PositiveFloat = Field(default=0.01, description="mu of mu/2 |y - x|^2; 0.001 to 1 are usual.")


class Proximal(LocalRule):
    """Pull the local parameters towards the base version."""

    parameters: ProximalParameters

    def __init__(self, plan: Plan, parameters: Parameters) -> None:
        super().__init__(plan, parameters)
        self._base: Mapping[str, torch.Tensor] = {}

    def receive(self, base: Mapping[str, torch.Tensor]) -> None:
        """Keep the base version."""
        self._base = base

    def after_backward(self, name: str, gradient: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Return gradient + mu (y - x)."""
        base = self._base[name].to(value.device)
        return gradient + self.parameters.mu * (value - base)


class FedProx(FedAvg):
    """FedAvg with the proximal local rule."""

    name: ClassVar[str] = "fedprox"
    parameters_type = ProximalParameters
    local_rule = Proximal
