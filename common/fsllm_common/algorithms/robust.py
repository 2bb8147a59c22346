"""What the rules that withstand some bad updates share.

They give every update the same say, whatever the plan's weighting: how many examples a site has is what it says of
itself. ``byzantine`` is how many of a round's updates may be anything at all.

A caution that holds for all of them where LoRA trains both factors: B A = (B G)(G^-1 A) for every invertible G, so two
sites can have learned the same and send vectors that differ in every coordinate and lie far apart. A rule that looks at
coordinates one by one is then meaningless, and the plan refuses it; distances, norms and angles still tell a wild
update from the others, but also part those that agree. With ``freeze_a`` all sites keep the A that they began with and
train and send B alone, in coordinates that mean the same everywhere (the parameterisation of FFA-LoRA, Sun et al. 2024,
arXiv 2403.12313).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field, NonNegativeInt

from fsllm.v1.tensors_pb2 import TENSOR_ROLE_LORA_A
from fsllm_common.algorithms.algorithm import FACTORS, LORA_A, Refusal, Update
from fsllm_common.algorithms.fedavg import FedAvg
from fsllm_common.algorithms.local_rule import Parameters

if TYPE_CHECKING:
    from fsllm.v1.tensors_pb2 import TensorRole


class RobustParameters(Parameters):
    """Of all of them."""

    freeze_a: bool = Field(
        default=False, description="Keep LoRA's A as it is in version 0, and train and send B alone."
    )


class ByzantineParameters(RobustParameters):
    """Of the rules that are told how many bad updates to withstand."""

    byzantine: NonNegativeInt = Field(default=1, description="f: how many of a round's updates may be anything.")


class Robust(FedAvg):
    """Every update has the same say, and A may stay where it is."""

    parameters_type = RobustParameters
    parameters: RobustParameters
    uniform = True
    coordinatewise: ClassVar[bool] = False
    """It looks at each coordinate by itself, so that they must mean the same at every site."""
    refuses: ClassVar[tuple[Refusal, ...]] = (
        Refusal(
            "algorithm.parameters.freeze_a, adapter.kind",
            lambda method: (
                method.plan.adapter.kind in FACTORS and method.coordinatewise and not method.parameters.freeze_a
            ),
            "sites that have learned the same can have other coordinates where both A and B are trained, for A and B "
            "can be exchanged by a rotation: say algorithm.parameters.freeze_a: true, which trains and sends B alone",
        ),
        Refusal(
            "algorithm.name, adapter.kind",
            lambda method: method.plan.adapter.kind == "vera" and method.coordinatewise,
            "VeRA trains two vectors that multiply each other, so that sites that have learned the same can have other "
            "values in both: take an adapter of another kind, or a rule that looks at whole updates (multi-krum)",
        ),
        Refusal(
            "algorithm.parameters.freeze_a, adapter.kind",
            lambda method: method.plan.adapter.kind not in FACTORS and method.parameters.freeze_a,
            "this kind has no A to freeze: leave freeze_a out",
        ),
        Refusal(
            "algorithm.name, cohort.buffer",
            lambda method: method.plan.cohort.buffer is not None and method.needs_rows,
            "this rule takes the middle of the values, whatever their shares, so that a stale update would count like "
            "a fresh one: leave cohort.buffer out, or take a rule that gives shares (multi-krum, geometric-median)",
        ),
    )

    def part(self, role: TensorRole.ValueType) -> str:
        """Return a part that never moves for a frozen A."""
        frozen = self.parameters.freeze_a and role == TENSOR_ROLE_LORA_A
        return LORA_A if frozen else super().part(role)

    def weigh(self, updates: Sequence[Update]) -> list[float]:
        """Return the same share for all."""
        return [1 / len(updates)] * len(updates)
