"""FDLoRA (Qi et al. 2024, arXiv 2406.07925): two LoRAs a site, one shared and one private, fused by w1 and w2.

In each round both are trained in turn, each by itself. The shared one is averaged with Nesterov's momentum at the
server (as in DiLoCo, Douillard et al. 2023, arXiv 2311.08105). Then w1 and w2 are searched for without gradients: such
that A = w1 A_own + w2 A_shared and B = w1 B_own + w2 B_shared have the least loss on one batch, with a price on
|w1| + |w2|.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, ClassVar, Final

from pydantic import Field, NonNegativeFloat, PositiveInt

from fsllm_common.algorithms.fedavgm import FedAvgM, MomentumParameters
from fsllm_common.algorithms.local_rule import LocalRule, LocalStep, Parameters, Turn

if TYPE_CHECKING:
    import torch

    from fsllm_common.algorithms.local_rule import Tensors
    from fsllm_common.plan import Plan

_WEIGHTS: Final = "weights"
_OWN: Final = "own/"
_BEGIN: Final = (0.5, 0.5)


class DualParameters(MomentumParameters):
    """FDLoRA's own."""

    nesterov: bool = Field(default=True, description="Step to where the momentum will be.")
    steps: PositiveInt | None = Field(default=None, description="Of the private LoRA in a round; unset: the plan's.")
    halvings: PositiveInt = Field(default=3, description="Of the search's stride, which begins with 0.5.")
    price: NonNegativeFloat = Field(default=0.05, description="Of |w1| + |w2|, in units of the loss.")


def search(
    loss: Callable[[float, float], float], begin: tuple[float, float], stride: float, halvings: int
) -> tuple[float, float]:
    """Return where a pattern search (Hooke and Jeeves 1961) ends: to the best neighbour, or to half the stride.

    Args:
        loss: To be made small.
        begin: Where from.
        stride: The first.
        halvings: How often it is halved before the search ends.

    """
    best, at = loss(*begin), begin
    while halvings > 0:
        x, y = at
        found = {near: loss(*near) for near in ((x + stride, y), (x - stride, y), (x, y + stride), (x, y - stride))}
        nearest = min(found, key=lambda near: found[near])
        if found[nearest] < best:
            best, at = found[nearest], nearest
        else:
            stride, halvings = stride / 2, halvings - 1
    return at


class Dual(LocalRule):
    """Train the shared LoRA, train the private one, and weigh them."""

    parameters: DualParameters

    def __init__(self, plan: Plan, parameters: Parameters) -> None:
        super().__init__(plan, parameters)
        self._base: Tensors = {}
        self._own: dict[str, torch.Tensor] = {}
        self._fuses = False

    def _recall(self, base: Tensors) -> None:
        self._base = base
        self._own = {name: self.private.get(f"{_OWN}{name}", tensor) for name, tensor in base.items()}

    def _weights(self) -> tuple[float, float]:
        kept = self.private.get(_WEIGHTS)
        return _BEGIN if kept is None else (float(kept[0]), float(kept[1]))

    def turns(self, base: Tensors, steps: int) -> Generator[Turn, Tensors, Tensors]:
        """Train the shared LoRA, which is sent; the private one, which begins as the first version; and fuse them."""
        self._recall(base)
        own_steps = self.parameters.steps or steps
        shared = yield Turn(base, steps, following=own_steps + 1)
        own = yield Turn(self._own, own_steps, following=1)
        self._own = dict(own)
        self.private.update({f"{_OWN}{name}": own[name] for name in self.trained})
        self._fuses = True
        yield Turn(own, 1)
        return shared

    def take_step(self, step: LocalStep) -> None:
        """Take an ordinary step, or search on its batch for the weights."""
        if not self._fuses:
            step.step()
            return
        import torch

        def loss(own: float, shared: float) -> float:
            step.write(self._fused(own, shared))
            return step.loss() + self.parameters.price * (abs(own) + abs(shared))

        found = search(loss, self._weights(), 0.5, self.parameters.halvings)
        self.private[_WEIGHTS] = torch.tensor(found)

    def _fused(self, own: float, shared: float) -> dict[str, torch.Tensor]:
        return {name: own * self._own[name] + shared * tensor for name, tensor in self._base.items()}

    def evaluated(self, base: Tensors, extra: Tensors) -> Tensors:
        """Return the fused LoRA, or the version at a site that has no private one yet."""
        if not self.private:
            return base
        self._recall(base)
        return self._fused(*self._weights())


class FDLoRA(FedAvgM):
    """The mean of the shared LoRAs, with momentum."""

    name: ClassVar[str] = "fdlora"
    adapter_kinds: ClassVar[tuple[str, ...] | None] = ("lora", "rslora")
    parameters_type = DualParameters
    server_learning_rate: ClassVar[float] = 0.7
    local_rule = Dual
