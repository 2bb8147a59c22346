"""FedNova (Wang et al. 2020, arXiv 2007.07481): x <- x + rate tau_eff sum_k p_k delta_k / |a_k|.

tau_eff = sum_k p_k |a_k|. A site's delta is eta times a sum of gradients, of which the j-th has the weight a_kj.
Divided by |a_k|, the sum of those weights, it is a mean, so a site that takes more steps does not pull the others
along. Plain SGD: |a_k| is the number of steps. With ``mu`` the local loss has mu/2 |y - x|^2 added, as in FedProx,
and |a_k| = (1 - |1 - eta mu|^steps) / (1 - |1 - eta mu|). Above eta mu = 1 weights of both signs are in turn: as in
any norm, they do not cancel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field, NonNegativeFloat

from fsllm_common.algorithms.algorithm import Refusal, Update
from fsllm_common.algorithms.fedavg import FedAvg
from fsllm_common.algorithms.fedprox import Proximal, overshoots
from fsllm_common.algorithms.local_rule import Parameters

if TYPE_CHECKING:
    import torch


class NovaParameters(Parameters):
    """FedNova's own."""

    mu: NonNegativeFloat = Field(default=0.0, description="mu of mu/2 |y - x|^2; 0: none.")


class NovaRule(Proximal):
    """The proximal rule, if there is a mu."""

    parameters: NovaParameters  # type: ignore[assignment]  # FedProx demands more of its own mu

    def after_backward(self, name: str, gradient: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Return gradient + mu (y - x)."""
        return super().after_backward(name, gradient, value) if self.parameters.mu else gradient


class FedNova(FedAvg):
    """Deltas as means over each site's own steps."""

    name: ClassVar[str] = "fednova"
    parameters_type = NovaParameters
    parameters: NovaParameters
    local_rule = NovaRule
    refuses: ClassVar[tuple[Refusal, ...]] = (
        Refusal(
            "algorithm.parameters.mu, train.schedule, train.warmup_rounds",
            lambda method: (
                method.parameters.mu > 0
                and (method.plan.train.schedule != "constant" or method.plan.train.warmup_rounds > 0)
            ),
            "fednova works out what a site's steps add up to from one learning rate: say schedule: constant and no "
            "warm-up",
        ),
        overshoots(lambda parameters: parameters.mu),
    )

    @property
    def needs_plain_sgd(self) -> bool:
        """Return True: else the weights of the gradients in a delta are others."""
        return True

    def norm(self, steps: int) -> float:
        """Return |a_k|, 1 or more: the sum of the sizes |1 - eta mu|^j of a site's gradients' weights in its delta."""
        pull = self.plan.train.learning_rate * self.parameters.mu
        lost = min(pull, 2 - pull)  # 1 - |1 - pull|, of which no digit is lost where it is small
        if lost in (0, 1):
            return float(steps) if lost == 0 else 1.0
        return -math.expm1(steps * math.log1p(-lost)) / lost

    def weigh(self, updates: Sequence[Update]) -> list[float]:
        """Return p_k tau_eff / |a_k|, p_k by the plan's weighting."""
        shares = super().weigh(updates)
        norms = [self.norm(max(1, update.steps)) for update in updates]
        effective = sum(share * norm for share, norm in zip(shares, norms, strict=True))
        return [share * effective / norm for share, norm in zip(shares, norms, strict=True)]
