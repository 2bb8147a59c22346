"""APFL (Deng et al. 2020, arXiv 2003.13461): each site uses alpha v + (1 - alpha) w, of its own v and the shared w.

In each step, of one batch: w <- w - eta grad f(w); v <- v - eta alpha grad f(m), where m = alpha v + (1 - alpha) w; and
alpha <- alpha - eta <v - w, grad f(m)>, kept within 0 and 1. w is sent; v and alpha stay. These steps are plain ones,
without clipping.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING, ClassVar, Final

from pydantic import Field

from fsllm_common.algorithms.fedavg import FedAvg
from fsllm_common.algorithms.local_rule import LocalRule, LocalStep, Parameters, Turn

if TYPE_CHECKING:
    import torch

    from fsllm_common.algorithms.local_rule import Tensors
    from fsllm_common.plan import Plan

_ALPHA: Final = "alpha"
_V: Final = "v/"


class APFLParameters(Parameters):
    """APFL's own."""

    alpha: float = Field(default=0.5, ge=0, le=1, description="Of the site's own v, to begin with.")
    adaptive: bool = Field(default=True, description="Learn alpha at each site; else it stays.")


class Mixture(LocalRule):
    """Train w, v and alpha."""

    parameters: APFLParameters

    def __init__(self, plan: Plan, parameters: Parameters) -> None:
        super().__init__(plan, parameters)
        self._alpha = 0.0
        self._v: dict[str, torch.Tensor] = {}

    def _recall(self, base: Tensors) -> None:
        """Take v, which begins as the version, and alpha."""
        self._v = {name: self.private.get(f"{_V}{name}", base[name]) for name in base}
        kept = self.private.get(_ALPHA)
        self._alpha = self.parameters.alpha if kept is None else float(kept)

    def turns(self, base: Tensors, steps: int) -> Generator[Turn, Tensors, Tensors]:
        """Train all three, keep v and alpha, and send w."""
        import torch

        self._recall(base)
        local = yield Turn(base, steps)
        self.private.update({f"{_V}{name}": self._v[name] for name in self.trained})
        self.private[_ALPHA] = torch.tensor(self._alpha)
        return local

    def take_step(self, step: LocalStep) -> None:
        """Take a step of each, all from where the last step has left the others."""
        rate, alpha = step.learning_rate, self._alpha
        w = step.values()
        of_w = step.gradients()
        step.write({name: alpha * self._v[name] + (1 - alpha) * w[name] for name in w})
        of_mixture = step.gradients()
        if self.parameters.adaptive:
            slope = sum(float(((self._v[name] - w[name]).double() * of_mixture[name]).sum()) for name in w)
            self._alpha = min(1.0, max(0.0, alpha - rate * slope))
        for name in w:
            self._v[name] = self._v[name] - rate * alpha * of_mixture[name]
        step.write({name: w[name] - rate * of_w[name] for name in w})

    def evaluated(self, base: Tensors, extra: Tensors) -> Tensors:
        """Return alpha v + (1 - alpha) x."""
        self._recall(base)
        return {name: self._alpha * self._v[name] + (1 - self._alpha) * x for name, x in base.items()}


class APFL(FedAvg):
    """The mean of the sites' w."""

    name: ClassVar[str] = "apfl"
    parameters_type = APFLParameters
    local_rule = Mixture

    @property
    def needs_plain_sgd(self) -> bool:
        """Return True: the local rule takes such steps, whatever the plan says."""
        return True
