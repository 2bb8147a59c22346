"""SCAFFOLD (Karimireddy et al. 2020, arXiv 1910.06378): y <- y - eta (g - c_k + c), so that sites do not drift apart.

A site's control variate c_k says where its own gradient points, the server's c where all of them do; the difference is
taken off every step. After the round c_k becomes, by ``estimate``, the gradient at x over as many batches as there are
steps (``gradient``, the paper's option I: right for any optimizer, at the price of a second pass), or c_k - c +
(x - y) / (K eta) (``steps``, option II: free, and right for plain SGD alone). The server takes x <- x + rate mean(dy)
and c <- c + |S|/N mean(dc): every site counts the same, whatever the plan's weighting.

c is the mean of all c_k, or the sites are led astray for good. So a c_k counts when the server has acknowledged its
change, and a site whose c_k the server has forgotten, since it was restored from a back-up, begins again with c: when
all sites do so, c is their mean again. In asynchronous rounds a change counts in full, however stale it is.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Final, Literal

from pydantic import Field, PositiveInt

from fsllm.v1.tensors_pb2 import TENSOR_ROLE_CONTROL
from fsllm_common.algorithms.algorithm import ADAPTER, Block, Refusal, Update
from fsllm_common.algorithms.fedavg import FedAvg
from fsllm_common.algorithms.local_rule import LocalRule, LocalStep, Parameters, Turn
from fsllm_common.tensors.manifest import role_of

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch

    from fsllm.v1.tensors_pb2 import TensorRole
    from fsllm_common.algorithms.local_rule import Tensors
    from fsllm_common.plan import Plan

CONTROL: Final = "control"
"""The part that c is in, and the prefix of its tensors' names."""

_ROUND: Final = "round"


class ScaffoldParameters(Parameters):
    """SCAFFOLD's own."""

    estimate: Literal["gradient", "steps"] = Field(
        default="gradient", description="How a site works out c_k: the paper's option I, or II."
    )
    sites: PositiveInt | None = Field(
        default=None, description="N, all sites there are; unset: those that cohort.sites names."
    )


class ControlVariate(LocalRule):
    """Correct each gradient by c - c_k."""

    parameters: ScaffoldParameters
    awaits_receipt: ClassVar[bool] = True

    def __init__(self, plan: Plan, parameters: Parameters) -> None:
        super().__init__(plan, parameters)
        self._all: dict[str, torch.Tensor] = {}
        self._own: dict[str, torch.Tensor] = {}
        self._sum: dict[str, torch.Tensor] = {}
        self._looks = False
        self._steps = 1

    def receive(self, base: Tensors, extra: Tensors) -> None:
        """Take c, and c_k, which begins with 0, or again with c."""
        self._all = {name: extra[f"{CONTROL}/{name}"] for name in self.trained}
        last = self.private.get(_ROUND)
        if last is not None and int(last) >= self.round:
            self._own = dict(self._all)
        else:
            self._own = {name: self.private.get(name, base[name] * 0) for name in self.trained}

    def turns(self, base: Tensors, steps: int) -> Generator[Turn, Tensors, Tensors]:
        """Take the gradient at x, where that is the estimate; then train."""
        self._steps = steps
        if self.parameters.estimate == "gradient":
            self._looks = True
            yield Turn(base, steps, following=steps)
            self._looks = False
        return (yield Turn(base, steps))

    def take_step(self, step: LocalStep) -> None:
        """Add up the gradient, or take an ordinary step."""
        if not self._looks:
            step.step()
            return
        for name, gradient in step.gradients().items():
            self._sum[name] = self._sum[name] + gradient if name in self._sum else gradient

    def after_backward(self, name: str, gradient: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Return g - c_k + c."""
        return gradient + (self._all[name] - self._own[name]).to(gradient.device)

    def produce(self, delta: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Add c_k's change, and keep the new c_k."""
        import torch

        far = self._steps * self.learning_rate
        changes = {}
        for name, moved in delta.items():
            own = self._own[name]
            fresh = self._sum[name] / self._steps if self._sum else own - self._all[name] - moved / far
            self.private[name] = fresh
            changes[f"{CONTROL}/{name}"] = fresh - own
        self.private[_ROUND] = torch.tensor(self.round)
        return delta | changes


class Scaffold(FedAvg):
    """The server's half: two parts, of which each takes its own step."""

    name: ClassVar[str] = "scaffold"
    parameters_type = ScaffoldParameters
    parameters: ScaffoldParameters
    local_rule = ControlVariate
    uniform = True
    # c_k's change is that of one site's whoever else has moved c since, and every one of them counts.
    any_version: ClassVar[bool] = True
    refuses: ClassVar[tuple[Refusal, ...]] = (
        Refusal(
            "algorithm.name, cohort.buffer.weight",
            lambda method: method.plan.cohort.buffer is not None and method.plan.cohort.buffer.weight != "constant",
            "scaffold's c is the mean of all c_k only while each change counts in full, however stale: say weight: "
            "constant, and bound the staleness by max_staleness",
        ),
        Refusal(
            "algorithm.parameters.sites, cohort.sites",
            lambda method: method.sites() < method.most(),
            "scaffold's c moves by the share of all sites that took part, who are at least cohort.quorum, cohort.size "
            "and those that are named: name them in cohort.sites, or say algorithm.parameters.sites: their number",
        ),
        Refusal(
            "algorithm.parameters.estimate, train.schedule, train.final_fraction",
            lambda method: (
                method.parameters.estimate == "steps"
                and method.plan.train.schedule != "constant"
                and method.plan.train.final_fraction == 0
            ),
            "estimate: steps divides the distance gone by the learning rate, which would be 0 in the last round: say a "
            "larger final_fraction, or estimate: gradient",
        ),
        Refusal(
            "algorithm.name, pipeline",
            lambda method: bool(method.plan.pipeline),
            "scaffold sends control variates beside the delta, which a clip would scale and noise would drown: leave "
            "the pipeline out, or take another method",
        ),
    )
    warns: ClassVar[tuple[Refusal, ...]] = (
        Refusal(
            "algorithm.name, train.optimizer",
            lambda method: method.plan.train.optimizer != "sgd",
            "scaffold undoes the sites' drift where steps are plain gradient steps; adamw rescales the corrected "
            "gradients element by element, which leaves some of it: measure it beside optimizer: sgd",
        ),
    )

    def part(self, role: TensorRole.ValueType) -> str:
        """Return c's part, or the adapter's."""
        return CONTROL if role == TENSOR_ROLE_CONTROL else super().part(role)

    def moving(self, round_: int) -> tuple[str, ...]:
        """Return both."""
        return (ADAPTER, CONTROL)

    def extra(self, adapter: Mapping[str, tuple[int, ...]]) -> Mapping[str, npt.NDArray[np.float32]]:
        """Return c of all that is trained, which begins with 0."""
        import numpy as np

        trained = {name: shape for name, shape in adapter.items() if self.part(role_of(name)) == ADAPTER}
        return {f"{CONTROL}/{name}": np.zeros(shape, np.float32) for name, shape in trained.items()}

    @property
    def needs_plain_sgd(self) -> bool:
        """Return whether c_k is read off the distance gone."""
        return self.parameters.estimate == "steps"

    def sites(self) -> int:
        """Return N."""
        return self.parameters.sites or len(self.plan.cohort.sites or ())

    def most(self) -> int:
        """Return how many sites the plan itself knows of."""
        cohort = self.plan.cohort
        return max(cohort.quorum, cohort.size or 0, len(cohort.sites or ()))

    def weigh(self, updates: Sequence[Update]) -> list[float]:
        """Return the same share for all: the mean of the paper."""
        return [1 / len(updates)] * len(updates)

    def apply(self, block: Block) -> npt.NDArray[np.float32]:
        """Return x + rate mean(dy), or c + |S|/N mean(dc)."""
        if block.part == CONTROL:
            return block.base + block.base.dtype.type(block.updates / self.sites()) * block.mean
        return super().apply(block)
