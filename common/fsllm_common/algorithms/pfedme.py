"""pFedMe (Dinh et al. 2020, arXiv 2006.08848): w <- w - eta lambda (w - theta).

theta ~ argmin f(theta) + lambda/2 |theta - w|^2: for each batch, theta takes ``inner_steps`` gradient steps on it, from
where the batch before has left it; then w, which began the round as the version, moves towards theta. w is sent; theta
is the site's own model. The paper's beta is the server's learning rate: x <- (1 - beta) x + beta mean(w). These steps
are plain ones, without clipping.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field, PositiveFloat, PositiveInt

from fsllm_common.algorithms.algorithm import Refusal
from fsllm_common.algorithms.fedavg import FedAvg
from fsllm_common.algorithms.local_rule import LocalRule, LocalStep, Parameters, Turn

if TYPE_CHECKING:
    import torch

    from fsllm_common.algorithms.local_rule import Tensors
    from fsllm_common.plan import Plan


class PFedMeParameters(Parameters):
    """pFedMe's own."""

    pull: PositiveFloat = Field(default=15.0, description="lambda of lambda/2 |theta - w|^2.")
    inner_steps: PositiveInt = Field(default=5, description="K, steps of theta on one batch.")
    inner_learning_rate: PositiveFloat | None = Field(default=None, description="Of theta; unset: the plan's, as w's.")


class Moreau(LocalRule):
    """Find theta on each batch, and move w towards it."""

    parameters: PFedMeParameters

    def __init__(self, plan: Plan, parameters: Parameters) -> None:
        super().__init__(plan, parameters)
        self._w: dict[str, torch.Tensor] = {}

    def turns(self, base: Tensors, steps: int) -> Generator[Turn, Tensors, Tensors]:
        """Train theta, keep it, and send w."""
        self._w = {name: base[name] for name in self.trained}
        theta = yield Turn(base, steps)
        self.private.update({name: theta[name] for name in self.trained})
        return {**base, **self._w}

    def take_step(self, step: LocalStep) -> None:
        """Take K steps of theta and one of w."""
        pull, rate = self.parameters.pull, self.parameters.inner_learning_rate or step.learning_rate
        theta = step.values()
        for _ in range(self.parameters.inner_steps):
            for name, gradient in step.gradients().items():
                theta[name] = theta[name] - rate * (gradient + pull * (theta[name] - self._w[name]))
            step.write(theta)
        self._w = {name: w - step.learning_rate * pull * (w - theta[name]) for name, w in self._w.items()}

    def evaluated(self, base: Tensors, extra: Tensors) -> Tensors:
        """Return theta, or x at a site that has none yet."""
        return {**base, **self.private}


class PFedMe(FedAvg):
    """The mean of the sites' w."""

    name: ClassVar[str] = "pfedme"
    parameters_type = PFedMeParameters
    parameters: PFedMeParameters
    local_rule = Moreau
    refuses: ClassVar[tuple[Refusal, ...]] = (
        Refusal(
            "train.learning_rate, algorithm.parameters",
            lambda method: method.fastest() * method.parameters.pull >= 2,
            "w and theta are pulled towards each other by learning rate x pull of their distance a step, which at 2 "
            "and more drives them apart: lower a rate or algorithm.parameters.pull",
        ),
    )

    def fastest(self) -> float:
        """Return the larger of the two learning rates."""
        return max(self.plan.train.learning_rate, self.parameters.inner_learning_rate or 0.0)

    @property
    def needs_plain_sgd(self) -> bool:
        """Return True: the local rule takes such steps, whatever the plan says."""
        return True
