"""FedMeZO (Ling et al. 2024, arXiv 2402.05926): FedAvg of sites that train without a backward pass, by MeZO.

MeZO (Malladi et al. 2023, arXiv 2305.17333): w <- w - eta rho z, with rho = (L(w + eps z) - L(w - eps z)) / 2 eps on
the step's batch and a fresh random z in each step, a site's own. Nothing is kept for a gradient, and z is made anew
from its seed rather than kept. Where the papers' z is Gaussian, this one is of fair signs (``seeds``).
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field, PositiveFloat

from fsllm_common.algorithms.fedavg import FedAvg
from fsllm_common.algorithms.local_rule import LocalRule, LocalStep, Parameters
from fsllm_common.algorithms.seeds import direction, drawn, losses_beside


class MeZOParameters(Parameters):
    """FedMeZO's own."""

    eps: PositiveFloat = Field(default=1e-3, description="How far from w the two losses are taken, in each element.")


class MeZO(LocalRule):
    """Take steps along random directions, as far as the loss falls there."""

    parameters: MeZOParameters

    def take_step(self, step: LocalStep) -> None:
        """Take w - eta rho z."""
        w, eps, key = step.values(), self.parameters.eps, drawn(self, step)
        above, below = losses_beside(step, w, key, eps)
        far = -step.learning_rate * (above - below) / (2 * eps)
        step.write({name: value.add(direction(name, value, key), alpha=far) for name, value in w.items()})


class FedMeZO(FedAvg):
    """The mean of the sites' deltas."""

    name: ClassVar[str] = "fedmezo"
    departs = "directions are fair signs, not Gaussian: the same bits on every device, and an estimate that varies less"
    parameters_type = MeZOParameters
    local_rule = MeZO

    @property
    def needs_plain_sgd(self) -> bool:
        """Return True: the local rule takes such steps, whatever the plan says."""
        return True
