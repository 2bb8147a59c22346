"""FedKSeed (Qin et al. 2024, arXiv 2312.06353): w = w0 - eta sum_j a_j z(s_j), and only the K numbers a_j travel.

All sites know the same K seeds s_j. A site rebuilds w, takes its steps w <- w - eta rho z(s_j) for seeds drawn at
random, with rho = (L(w + eps z) - L(w - eps z)) / 2 eps on the step's batch, and sends the sum of rho for each seed;
the server adds up a_j <- a_j + sum_k p_k rho_kj. It holds no model but version 0's adapter, and a few kilobytes go
each way. With its update a site sends the digest of what it has rebuilt, and one that differs is refused.

What a site trains towards is what all rebuild, to the last bit. As the sum has one eta and knows no decay, the learning
rate has to be constant. The paper fine-tunes all weights, with Gaussian z; here it is the adapter, and fair signs
(``seeds``). To rebuild takes K signs an element, of which a core draws about half a billion a second: for an adapter of
8 million elements a minute, once a round.

FedKSeed-Pro (``draw: amplitude``) prefers the seeds whose |rho| have been large, here and elsewhere: it draws them with
p = softmax(the mean |rho| of each, brought to 0 for the least of them and to 1 for the largest). Sites send the sum
of |rho| and the draws of each seed besides, and the same weights as the model's make the two means that are divided.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Final, Literal

from pydantic import Field, PositiveFloat

from fsllm_common import philox
from fsllm_common.algorithms.algorithm import Refusal
from fsllm_common.algorithms.local_rule import LocalStep, Parameters
from fsllm_common.algorithms.seeds import (
    SCALARS,
    Directions,
    Rebuilding,
    Rebuilt,
    as_torch,
    drawn,
    losses_beside,
    moved,
    units,
)

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch

    from fsllm_common.algorithms.local_rule import Tensors
    from fsllm_common.algorithms.seeds import Array, Wide
    from fsllm_common.plan import Plan

COEFFICIENTS: Final = f"{SCALARS}coefficients"
AMPLITUDES: Final = f"{SCALARS}amplitudes"
DRAWS: Final = f"{SCALARS}draws"

_MOST_AMPLITUDE: Final = 1000.0  # the authors' code clips |rho| to it: one accident is not all that counts


class KSeedParameters(Parameters):
    """FedKSeed's own."""

    seeds: int = Field(default=4096, ge=1, le=2**20, description="K, how many directions there are in the whole run.")
    eps: PositiveFloat = Field(default=5e-4, description="How far from w the two losses are taken, in each element.")
    draw: Literal["evenly", "amplitude"] = Field(
        default="evenly", description="amplitude: FedKSeed-Pro, which draws seeds of a large mean |rho| more often."
    )

    @property
    def pro(self) -> bool:
        """Whether this is FedKSeed-Pro."""
        return self.draw == "amplitude"


def chances(amplitudes: Array, draws: Array) -> Wide:
    """Return FedKSeed-Pro's probability of each seed, of the sums of |rho| and of the draws; all the same at first."""
    import numpy as np

    means = np.divide(amplitudes, draws, out=np.zeros(len(draws)), where=draws > 0, dtype=np.float64)
    spread = means.max() - means.min()
    weights: Wide = np.exp((means - means.min()) / (spread or 1.0))
    probabilities: Wide = weights / weights.sum()
    return probabilities


def keys(plan: Plan, seeds: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return what the directions of these seeds, 0 to K - 1, are drawn with."""
    return seeds + (plan.seed << 32)


def steps(plan: Plan, coefficients: Array) -> Wide:
    """Return by how many units of its direction each seed moves the adapter: -eta a_j."""
    return units(-plan.train.learning_rate * coefficients.astype("f8"))


class Seeded(Rebuilding):
    """Take steps along the directions of K seeds, and add up how far."""

    parameters: KSeedParameters

    def receive(self, base: Tensors, extra: Tensors) -> None:
        """Rebuild the adapter, to go on from."""
        super().receive(base, extra)
        import numpy as np

        self._before = self._tensors[COEFFICIENTS]
        self._sums = np.zeros_like(self._before)
        self._amplitudes, self._draws = self._sums + 0, self._sums + 0
        if self.parameters.pro:
            self._up_to = chances(self._tensors[AMPLITUDES], self._tensors[DRAWS]).cumsum()

    def take_step(self, step: LocalStep) -> None:
        """Take w - eta rho z, where rho has become part of a_j."""
        import numpy as np

        seed = np.array([self._seed(drawn(self, step))])
        (key,), eps = keys(self.plan, seed), self.parameters.eps
        above, below = losses_beside(step, step.values(), int(key), eps)
        before = steps(self.plan, self._before[seed] + self._sums[seed])
        rho = (above - below) / (2 * eps)
        self._sums[seed] += np.float32(rho)
        self._amplitudes[seed] += np.float32(min(abs(rho), _MOST_AMPLITUDE))
        self._draws[seed] += 1
        further = steps(self.plan, self._before[seed] + self._sums[seed]) - before
        for name, far in self._far.items():
            self._far[name] = far + further * philox.signs(far.shape, int(key), philox.stream(name))
        step.write(as_torch({name: moved(self._tensors[name], far) for name, far in self._far.items()}))

    def _seed(self, number: int) -> int:
        """Return a seed for a random number of 64 bits."""
        if not self.parameters.pro:
            return number % len(self._sums)
        found = int(self._up_to.searchsorted((number % 2**64) / 2**64, side="right"))
        return min(found, len(self._up_to) - 1)  # the last sum may be a little below 1

    def produce(self, delta: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the sums of rho, and what FedKSeed-Pro adds."""
        added = {AMPLITUDES: self._amplitudes, DRAWS: self._draws} if self.parameters.pro else {}
        return as_torch({COEFFICIENTS: self._sums, **added})


class FedKSeed(Rebuilt):
    """The weighted mean of the sums."""

    name: ClassVar[str] = "fedkseed"
    departs = (
        "it is the adapter that is trained, not all weights; directions are fair signs, not Gaussian: the same "
        "bits on every device, and an estimate that varies less"
    )
    parameters_type = KSeedParameters
    parameters: KSeedParameters
    local_rule = Seeded

    refuses: ClassVar[tuple[Refusal, ...]] = (
        Refusal(
            "algorithm.name, train.schedule, train.warmup_rounds",
            lambda method: method.plan.train.schedule != "constant" or method.plan.train.warmup_rounds > 0,
            "fedkseed's model is one learning rate times a sum over all rounds: say schedule: constant and no warm-up",
        ),
    )

    @property
    def needs_plain_sgd(self) -> bool:
        """Return True: the sum knows of such steps only."""
        return True

    def moving(self, round_: int) -> tuple[str, ...]:
        """Return the numbers."""
        return ("coefficients",)

    def extra(self, adapter: Mapping[str, tuple[int, ...]]) -> Mapping[str, Array]:
        """Return a, which begins with 0, and for FedKSeed-Pro what its draws go by."""
        import numpy as np

        names = (COEFFICIENTS, AMPLITUDES, DRAWS) if self.parameters.pro else (COEFFICIENTS,)
        return {name: np.zeros(self.parameters.seeds, np.float32) for name in names}

    def distances(self, tensors: Mapping[str, Array]) -> Mapping[str, Wide]:
        """Return -eta sum_j a_j z(s_j)."""
        import numpy as np

        a = tensors[COEFFICIENTS]
        far, known = steps(self.plan, a), keys(self.plan, np.arange(len(a), dtype=np.int64))
        return {
            name: Directions(known, philox.stream(name)).sum(far, tensors[name].size).reshape(tensors[name].shape)
            for name in self.moves(tensors)
        }
