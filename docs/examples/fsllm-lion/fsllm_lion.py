"""FedLion: Lion (Chen et al. 2023, arXiv 2302.06675) at the server, x <- x + rate sign(beta1 m + (1 - beta1) d).

d is the mean delta, and m <- beta2 m + (1 - beta2) d. At the sites FedProx's pull (Li et al. 2020, arXiv 1812.06127)
towards the version, mu_r = mu fade^(r - 1) in round r: strong while the sites still drift apart, weak in the end.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field, NonNegativeFloat

from fsllm_common.algorithms import Block, LocalRule, Parameters, Refusal
from fsllm_common.algorithms.fedavg import FedAvg

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch

    from fsllm_common.algorithms.local_rule import Tensors
    from fsllm_common.plan import Plan


class LionParameters(Parameters):
    """FedLion's own."""

    beta1: float = Field(default=0.9, ge=0, lt=1, description="What the momentum counts for in a step.")
    beta2: float = Field(default=0.99, ge=0, lt=1, description="How long the momentum remembers.")
    mu: NonNegativeFloat = Field(default=0.1, description="The pull towards the version in the first round; 0: none.")
    fade: float = Field(default=0.8, gt=0, le=1, description="What is left of the pull from one round to the next.")


class FadingPull(LocalRule):
    """The site's half: add mu_r (y - x) to each gradient."""

    parameters: LionParameters

    def __init__(self, plan: Plan, parameters: Parameters) -> None:
        super().__init__(plan, parameters)
        self._base: Tensors = {}

    def receive(self, base: Tensors, extra: Tensors) -> None:
        """Keep x."""
        self._base = base

    def after_backward(self, name: str, gradient: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Return gradient + mu_r (y - x)."""
        pull = self.parameters.mu * self.parameters.fade ** (self.round - 1)
        return gradient + pull * (value - self._base[name].to(value.device))


class FedLion(FedAvg):
    """The server's half: every coordinate takes a step of the same length."""

    name: ClassVar[str] = "fedlion"
    parameters_type = LionParameters
    parameters: LionParameters
    local_rule = FadingPull
    server_learning_rate: ClassVar[float] = 0.003
    refuses: ClassVar[tuple[Refusal, ...]] = (
        Refusal(
            "algorithm.name, cohort.buffer",
            lambda method: method.plan.cohort.buffer is not None,
            "a step is as long as ever, however little stale updates weigh: leave cohort.buffer out",
        ),
    )

    def state(self) -> Mapping[str, float]:
        """Return the momentum m, which begins with 0."""
        return {"momentum": 0.0}

    def apply(self, block: Block) -> npt.NDArray[np.float32]:
        """Return x + rate sign(beta1 m + (1 - beta1) d), and leave the next m."""
        import numpy as np

        momentum, real = block.state["momentum"], block.base.dtype.type
        beta1, beta2 = real(self.parameters.beta1), real(self.parameters.beta2)
        direction: npt.NDArray[np.float32] = np.sign(beta1 * momentum + (real(1) - beta1) * block.mean)
        momentum *= beta2
        momentum += (real(1) - beta2) * block.mean
        return block.base + self.rate(block) * direction
