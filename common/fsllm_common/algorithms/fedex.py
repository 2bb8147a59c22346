"""FedEx (Khodak et al. 2021, arXiv 2106.04502): hyper-parameters tuned while training, by exponentiated gradient.

Each arm is a choice of local hyper-parameters. In a round a site draws one from theta = softmax(log-weights), trains
with it, and sends for it (loss after - baseline) / theta, losses being those of its validation rows, and 0 for the
others: an unbiased estimate of what each arm is worth. The server takes log-weights <- log-weights - eta mean(gradient)
with eta = sqrt(2 ln c) / sqrt(sum over the rounds so far of the largest element's square), c the number of arms.

The adapter is FedAvg's, and the mean of the gradients has its weights. Log-weights are float32 at the server, whatever
travels: a site draws from, and divides by, those that it has got. An arm that makes a site's loss infinite ends its
round, as it would in any run: choose arms that merely train badly.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Generator, Mapping
from itertools import product
from typing import TYPE_CHECKING, ClassVar, Final

from pydantic import Field, field_validator

from fsllm.v1.tensors_pb2 import TENSOR_ROLE_SCALAR
from fsllm_common.algorithms.algorithm import ADAPTER, Block, Refusal
from fsllm_common.algorithms.fedavg import FedAvg
from fsllm_common.algorithms.local_rule import LocalRule, Parameters, Turn

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch

    from fsllm.v1.tensors_pb2 import TensorRole
    from fsllm_common.algorithms.local_rule import Tensors
    from fsllm_common.plan import Plan

ARMS: Final = "arms"
"""The part that the log-weights are in: so small that it is one block."""

LOG_WEIGHTS: Final = "scalars/arms"
"""(arms,), the largest of them 0 after each round."""

_LOSS: Final = "loss"
_ROUNDS: Final = "rounds"
_MOST_ARMS: Final = 256


class FedExParameters(Parameters):
    """FedEx's own. An arm is a learning rate with a number of steps: learning_rates x steps."""

    learning_rates: str = Field(
        default="0.3,1,3", description="What to try, as factors of train.learning_rate, between commas."
    )
    steps: str = Field(default="1", description="What to try, as factors of the round's steps, between commas.")
    discount: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="gamma: a site's baseline is the mean of its losses after earlier rounds, the one s rounds before "
        "the last counting gamma^s; unset: its loss before training.",
    )
    cutoff: float = Field(
        default=0,
        ge=0,
        description="Once theta's entropy, in nats, is below it, sites train with the likeliest arm and measure no "
        "more; 0: they try all arms to the end.",
    )

    @field_validator("learning_rates", "steps")
    @classmethod
    def _are_factors(cls, text: str) -> str:
        factors(text)
        return text

    @property
    def arms(self) -> list[tuple[float, float]]:
        """Each arm's factors, of the learning rate and of the steps."""
        return list(product(factors(self.learning_rates), factors(self.steps)))


def factors(text: str) -> list[float]:
    """Return the numbers between commas.

    Raises:
        ValueError: They are not positive numbers, each once.

    """
    try:
        found = [float(word) for word in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(number > 0 and math.isfinite(number) for number in found):
        raise ValueError("should be positive numbers between commas, such as 0.3,1,3")
    if len(set(found)) < len(found):
        raise ValueError("names a number twice")
    return found


class DrawnArm(LocalRule):
    """Train with an arm, and say what it was worth."""

    parameters: FedExParameters
    validates: ClassVar[bool] = True

    def __init__(self, plan: Plan, parameters: Parameters) -> None:
        super().__init__(plan, parameters)
        self.arm = 0
        self._decided = False
        self._gradient: torch.Tensor

    def receive(self, base: Tensors, extra: Tensors) -> None:
        """Draw an arm, unless theta has decided.

        Which one follows from the plan's seed, the round and the site's examples: each rank draws the same, as does a
        site that trains the round again, and no one else knows it before.
        """
        logs = extra[LOG_WEIGHTS].double().log_softmax(0)
        self._theta = logs.exp()
        self._decided = -float((self._theta * logs).sum()) < self.parameters.cutoff
        if self._decided:
            self.arm = int(logs.argmax())
            return
        text = f"{self.plan.seed}/{self.round}/{self.site}/arm".encode()
        drawn = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") / 2**64
        self.arm = min(int((self._theta.cumsum(0) <= drawn).sum()), len(self._theta) - 1)

    def turns(self, base: Tensors, steps: int) -> Generator[Turn, Tensors, Tensors]:
        """Train with the arm, and measure before and after."""
        rate, share = self.parameters.arms[self.arm]
        turn = Turn(base, max(1, round(steps * share)), learning_rate=self.learning_rate * rate)
        self._gradient = (self._theta * 0).float()
        if self._decided:
            return (yield turn)
        before = self.validate(base)
        local = yield turn
        after = self.validate(local)
        self._gradient[self.arm] = (after - self._baseline(before, after)) / float(self._theta[self.arm])
        return local

    def _baseline(self, before: float, after: float) -> float:
        """Return what the loss after training is compared with, and keep that loss for the next round."""
        gamma = self.parameters.discount
        if gamma is None:
            return before
        fresh = self._theta.new_tensor([after])
        summed, rounds = self.private.get(_LOSS, fresh * 0).double(), self.private.get(_ROUNDS, fresh * 0).double()
        self.private[_LOSS], self.private[_ROUNDS] = (gamma * summed + after).float(), (gamma * rounds + 1).float()
        return float(summed / rounds) if float(rounds) else before

    def produce(self, delta: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Add the gradient of the log-weights."""
        return {**delta, LOG_WEIGHTS: self._gradient}


class FedEx(FedAvg):
    """FedAvg, and a step of the exponentiated gradient."""

    name: ClassVar[str] = "fedex"
    parameters_type = FedExParameters
    parameters: FedExParameters
    local_rule = DrawnArm
    refuses: ClassVar[tuple[Refusal, ...]] = (
        Refusal(
            "algorithm.name, pipeline, wire.max_update_norm",
            lambda method: bool(method.plan.pipeline) or method.plan.wire.max_update_norm is not None,
            "fedex sends what an arm was worth beside the delta: a clip or a largest norm would take the two for one "
            "vector, and noise that is sized for a clipped delta would not cover a loss: leave both out",
        ),
        Refusal(
            "algorithm.name, data.validation_fraction",
            lambda method: method.plan.data.validation_fraction == 0,
            "fedex compares losses on each site's validation rows: say a fraction above 0",
        ),
        Refusal(
            "algorithm.parameters.learning_rates, algorithm.parameters.steps",
            lambda method: not 2 <= len(method.parameters.arms) <= _MOST_ARMS,
            f"fedex chooses between 2 to {_MOST_ARMS} arms, which are learning_rates x steps: say more, or fewer",
        ),
    )

    def part(self, role: TensorRole.ValueType) -> str:
        """Return the log-weights' part, or the adapter's."""
        return ARMS if role == TENSOR_ROLE_SCALAR else super().part(role)

    def moving(self, round_: int) -> tuple[str, ...]:
        """Return both."""
        return (ADAPTER, ARMS)

    def extra(self, adapter: Mapping[str, tuple[int, ...]]) -> Mapping[str, npt.NDArray[np.float32]]:
        """Return log-weights of 0: all arms are as likely."""
        import numpy as np

        return {LOG_WEIGHTS: np.zeros(len(self.parameters.arms), np.float32)}

    def remembers(self) -> int:
        """Return 1: the sum of the squares of the gradients' largest elements."""
        return 1

    def apply(self, block: Block) -> npt.NDArray[np.float32]:
        """Return x + rate mean, or all log-weights at once: that part is one block."""
        if block.part != ARMS:
            return super().apply(block)
        import numpy as np

        self.memory = [self.memory[0] + float(np.abs(block.mean).max()) ** 2]
        if not self.memory[0]:
            return block.base + 0
        eta = math.sqrt(2 * math.log(len(block.base))) / math.sqrt(self.memory[0])
        stepped = block.base - block.base.dtype.type(eta) * block.mean
        moved: npt.NDArray[np.float32] = stepped - stepped.max()
        return moved
