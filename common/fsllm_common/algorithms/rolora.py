"""RoLoRA (Chen et al. 2025, arXiv 2502.01755): B is trained and averaged in odd rounds, A in even ones.

Either is exact, as one factor is the same everywhere; half the bytes travel, and both factors learn.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from fsllm.v1.tensors_pb2 import TENSOR_ROLE_LORA_A
from fsllm_common.algorithms.algorithm import ADAPTER, LORA_A
from fsllm_common.algorithms.fedavg import FedAvg

if TYPE_CHECKING:
    from fsllm.v1.tensors_pb2 import TensorRole


class RoLoRA(FedAvg):
    """Two parts that take turns."""

    name: ClassVar[str] = "rolora"
    adapter_kinds: ClassVar[tuple[str, ...] | None] = ("lora", "dora", "rslora")
    any_rank: ClassVar[bool] = True

    def part(self, role: TensorRole.ValueType) -> str:
        """Return A's part, or the adapter."""
        return LORA_A if role == TENSOR_ROLE_LORA_A else ADAPTER

    def moving(self, round_: int) -> tuple[str, ...]:
        """Return the rest in odd rounds (B was 0, so it goes first), A in even ones."""
        return (ADAPTER,) if round_ % 2 else (LORA_A,)
