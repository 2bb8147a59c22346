"""FedProx (Li et al. 2020, arXiv 1812.06127): FedAvg whose local loss has mu/2 |y - x|^2 added.

The term is added to the gradient, as mu (y - x), rather than to the loss: it is the same step, costs no graph, and
works under every ZeRO stage (under ZeRO-3 a loss can not even see the parameters).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, PositiveFloat

from fsllm_common.algorithms.algorithm import Refusal
from fsllm_common.algorithms.fedavg import FedAvg
from fsllm_common.algorithms.local_rule import LocalRule, Parameters

if TYPE_CHECKING:
    import torch

    from fsllm_common.algorithms.local_rule import Tensors
    from fsllm_common.plan import Plan


class ProximalParameters(Parameters):
    """FedProx's own."""

    mu: PositiveFloat = Field(default=0.01, description="mu of mu/2 |y - x|^2; 0.001 to 1 are usual.")


class Proximal(LocalRule):
    """Pull the local parameters towards the base version."""

    parameters: ProximalParameters

    def __init__(self, plan: Plan, parameters: Parameters) -> None:
        super().__init__(plan, parameters)
        self._base: Tensors = {}

    def receive(self, base: Tensors, extra: Tensors) -> None:
        """Keep the base version."""
        self._base = base

    def after_backward(self, name: str, gradient: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Return gradient + mu (y - x)."""
        base = self._base[name].to(value.device)
        return gradient + self.parameters.mu * (value - base)


def overshoots(pull: Callable[[Any], float]) -> Refusal:
    """Refuse a pull towards x, of a method's parameters, that plain steps overshoot by ever more.

    The term alone takes y - x to (1 - eta mu) (y - x): in absolute value that falls only where eta mu < 2.
    """
    return Refusal(
        "train.learning_rate, algorithm.parameters",
        lambda method: (
            method.plan.train.optimizer == "sgd" and method.plan.train.learning_rate * pull(method.parameters) >= 2
        ),
        "a step of sgd takes back learning rate x mu (ditto: pull) of the way from the version, which at 2 and more "
        "leads further away each time: lower one of them",
    )


class FedProx(FedAvg):
    """FedAvg with the proximal local rule."""

    name: ClassVar[str] = "fedprox"
    parameters_type = ProximalParameters
    local_rule = Proximal
    refuses: ClassVar[tuple[Refusal, ...]] = (overshoots(lambda parameters: parameters.mu),)
