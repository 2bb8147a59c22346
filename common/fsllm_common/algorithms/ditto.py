"""Ditto (Li et al. 2021, arXiv 2012.04221): FedAvg for x, and at each site v <- v - eta (grad f(v) + lambda (v - x)).

The site's own v stays with it. It takes the same number of steps as x unless the plan says otherwise, pulled to the x
that the round began with; a large lambda makes it FedAvg's model, a small one the site's alone.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field, NonNegativeFloat, PositiveInt

from fsllm_common.algorithms.algorithm import Refusal
from fsllm_common.algorithms.fedavg import FedAvg
from fsllm_common.algorithms.fedprox import overshoots
from fsllm_common.algorithms.local_rule import LocalRule, Parameters, Turn

if TYPE_CHECKING:
    import torch

    from fsllm_common.algorithms.local_rule import Tensors
    from fsllm_common.plan import Plan


class DittoParameters(Parameters):
    """Ditto's own."""

    pull: NonNegativeFloat = Field(default=0.1, description="lambda of lambda/2 |v - x|^2; 0.05 to 2 are usual.")
    steps: PositiveInt | None = Field(default=None, description="Of v in a round; unset: as many as x takes.")


class Own(LocalRule):
    """Train x, then v."""

    parameters: DittoParameters

    def __init__(self, plan: Plan, parameters: Parameters) -> None:
        super().__init__(plan, parameters)
        self._base: Tensors = {}
        self._own = False

    def receive(self, base: Tensors, extra: Tensors) -> None:
        """Keep x."""
        self._base = base

    def turns(self, base: Tensors, steps: int) -> Generator[Turn, Tensors, Tensors]:
        """Train x, which is sent, and then v, which begins as x and is kept."""
        own_steps = self.parameters.steps or steps
        shared = yield Turn(base, steps, following=own_steps)
        self._own = True
        own = yield Turn({**base, **self.private}, own_steps)
        self.private.update({name: own[name] for name in self.trained})
        return shared

    def after_backward(self, name: str, gradient: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Return x's gradient as it is, and v's + lambda (v - x)."""
        if not self._own:
            return gradient
        return gradient + self.parameters.pull * (value - self._base[name].to(value.device))

    def evaluated(self, base: Tensors, extra: Tensors) -> Tensors:
        """Return v, or x at a site that has none yet."""
        return {**base, **self.private}


class Ditto(FedAvg):
    """FedAvg, with a model of its own at each site."""

    name: ClassVar[str] = "ditto"
    parameters_type = DittoParameters
    local_rule = Own
    refuses: ClassVar[tuple[Refusal, ...]] = (overshoots(lambda parameters: parameters.pull),)
