"""FedProx (Li et al. 2020, arXiv 1812.06127): FedAvg whose local loss has mu/2 |y - x|^2 added.

The term is added to the gradient, as mu (y - x), rather than to the loss: it is the same step, costs no graph, and
works under every ZeRO stage (under ZeRO-3 a loss can not even see the parameters).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from fsllm_common.algorithms.fedavg import FedAvg
from fsllm_common.algorithms.interface import LocalRule

if TYPE_CHECKING:
    import torch

    from fsllm_common.plan import Plan


class Proximal(LocalRule):
    """Pull the local parameters towards the base version."""

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan)
        self._base: Mapping[str, torch.Tensor] = {}

    def receive(self, base: Mapping[str, torch.Tensor]) -> None:
        """Keep the base version."""
        self._base = base

    def after_backward(self, name: str, gradient: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Return gradient + mu (y - x)."""
        base = self._base[name].to(value.device)
        return gradient + self.plan.algorithm.proximal_mu * (value - base)


class FedProx(FedAvg):
    """FedAvg with the proximal local rule."""

    name: ClassVar[str] = "fedprox"
    local_rule = Proximal
