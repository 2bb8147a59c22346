"""HetLoRA (Cho et al. 2024, arXiv 2401.06432): factors of different ranks, filled up with zeros and averaged.

Each module's weights are the norms |s_k B_k A_k| over their sum: who has learnt nothing there dilutes nobody.
A site of rank r gets the first r rows of A and columns of B. Scales are folded into B, or ranks would be weighed anew.

With ``prune_penalty`` sites prune ranks of their own, module by module. The local loss gains lambda |B'| |A'|, with the
columns and rows B' and A' of B and A beyond the first gamma r. Where that product of norms has fallen over the round,
they are cut to 0, and the site goes on with rank gamma r. Tensors keep their shapes.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping
from typing import TYPE_CHECKING, ClassVar, Final

from pydantic import Field, NonNegativeFloat

from fsllm_common.algorithms.fedavg import FedAvg
from fsllm_common.algorithms.layers import by_module, module_and_key
from fsllm_common.algorithms.local_rule import LocalRule, LocalStep, Parameters, Turn

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch

    from fsllm_common.algorithms.layers import Layer
    from fsllm_common.algorithms.local_rule import Tensors
    from fsllm_common.plan import Plan

_RANK: Final = "rank/"
"""What ``private`` has for each module: how many ranks are left of it."""


class HetLoRAParameters(Parameters):
    """HetLoRA's own."""

    prune_penalty: NonNegativeFloat = Field(
        default=0.0, description="lambda: what a module's last ranks cost in the local loss; 0: nothing is pruned."
    )
    keep: float = Field(default=0.99, gt=0, lt=1, description="gamma: the share of ranks that pruning leaves.")


class SelfPruning(LocalRule):
    """Make the last ranks small, and give up those that have become smaller."""

    parameters: HetLoRAParameters

    def __init__(self, plan: Plan, parameters: Parameters) -> None:
        super().__init__(plan, parameters)
        self._modules: dict[str, dict[str, str]] = {}
        self._ranks: dict[str, int] = {}
        self._before: dict[str, float] = {}
        self._now: Tensors = {}

    def receive(self, base: Tensors, extra: Tensors) -> None:
        """Take up the ranks that are left, and see how much the last of them weigh."""
        self._modules = {module: names for module, names in by_module(base).items() if {"A", "B"} <= names.keys()}
        for module, names in self._modules.items():
            left = self.private.get(_RANK + module)
            self._ranks[module] = base[names["A"]].shape[0] if left is None else int(left)
        self._before = self._weights(self._cut(base))

    def turns(self, base: Tensors, steps: int) -> Generator[Turn, Tensors, Tensors]:
        """Train the ranks that are left, then prune them."""
        local = yield Turn(self._cut(base), steps)
        for module, weight in self._weights(local).items():
            if weight < self._before[module]:
                self._ranks[module] = self._first(module)
            self.private[_RANK + module] = base[self._modules[module]["A"]].new_tensor([self._ranks[module]])
        return self._cut(local)

    def take_step(self, step: LocalStep) -> None:
        """Take an ordinary step, knowing both factors of each module."""
        self._now = step.values()
        step.step()

    def after_backward(self, name: str, gradient: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Return gradient + lambda |B'| A' / |A'| in A's last rows, and lambda |A'| B' / |B'| in B's last columns."""
        module, key = module_and_key(name)
        if module not in self._modules or key not in _PARTNERS:
            return gradient
        first, partner = self._first(module), _PARTNERS[key]
        own = _last(value, key, first)
        norm = float(own.norm())
        if norm == 0:
            return gradient  # it is at its least
        other = float(_last(self._now[self._modules[module][partner]], partner, first).norm())
        changed = gradient.clone()
        _last(changed, key, first).add_(own, alpha=self.parameters.prune_penalty * other / norm)
        return changed

    def _first(self, module: str) -> int:
        """Return gamma r, where the ranks begin that are to be pruned; r where that would leave none."""
        return math.floor(self.parameters.keep * self._ranks[module]) or self._ranks[module]

    def _weights(self, adapter: Tensors) -> dict[str, float]:
        """Return |B'| |A'| of each module."""
        return {
            module: math.prod(float(_last(adapter[names[key]], key, self._first(module)).norm()) for key in _PARTNERS)
            for module, names in self._modules.items()
        }

    def _cut(self, adapter: Tensors) -> dict[str, torch.Tensor]:
        """Return the adapter with zeros where ranks have been given up."""
        cut = {name: value.clone() for name, value in adapter.items()}
        for module, names in self._modules.items():
            for key in _PARTNERS:
                _last(cut[names[key]], key, self._ranks[module]).zero_()
        return cut


_PARTNERS: Final = {"A": "B", "B": "A"}


def _last(factor: torch.Tensor, key: str, first: int) -> torch.Tensor:
    """Return a view of the last ranks of A (r, n) or B (m, r)."""
    return factor[first:] if key == "A" else factor[:, first:]


class HetLoRA(FedAvg):
    """Zero-padding and norm weights."""

    name: ClassVar[str] = "hetlora"
    departs = "nothing is pruned unless prune_penalty says so"
    adapter_kinds: ClassVar[tuple[str, ...] | None] = ("lora", "rslora")
    parameters_type = HetLoRAParameters
    parameters: HetLoRAParameters
    local_rule = SelfPruning
    needs_layers = True
    any_rank: ClassVar[bool] = True
    uniform = True

    def rule(self) -> type[LocalRule]:
        """Return the rule that prunes, if there is a price."""
        return SelfPruning if self.parameters.prune_penalty else LocalRule

    def combine_layer(self, layer: Layer) -> Mapping[str, npt.NDArray[np.float64]]:
        """Return the weighted mean of the padded factors."""
        if not layer.is_lora:
            return {}
        norms = [update.scale * product_norm(update.tensors["B"], update.tensors["A"]) for update in layer.updates]
        total = sum(norms)
        shares = [norm / total for norm in norms] if total > 0 else [update.share for update in layer.updates]
        return {key: layer.mean(key, shares) for key in ("A", "B")}


def product_norm(b: npt.NDArray[np.float64], a: npt.NDArray[np.float64]) -> float:
    """Return the Frobenius norm of B A, from the r x r matrices only: its square is tr((B^T B)(A A^T))."""
    square = float(((b.T @ b) * (a @ a.T)).sum())
    return math.sqrt(max(0.0, square))
