"""Fed-SB (Singhal et al. 2025, arXiv 2502.15436): W0 + s B R A with A and B frozen; the small R is averaged.

Exact, and r x r numbers a module travel, whatever the model's size. A and B come with version 0
(adapter.kind: lora-xs).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from fsllm.v1.tensors_pb2 import TENSOR_ROLE_LORA_A, TENSOR_ROLE_LORA_B
from fsllm_common.algorithms.algorithm import ADAPTER
from fsllm_common.algorithms.fedavg import FedAvg

if TYPE_CHECKING:
    from fsllm.v1.tensors_pb2 import TensorRole


class FedSB(FedAvg):
    """The frozen factors are a part of their own, fetched once."""

    name: ClassVar[str] = "fed-sb"
    adapter_kinds: ClassVar[tuple[str, ...] | None] = ("lora-xs",)
    any_rank: ClassVar[bool] = True

    def part(self, role: TensorRole.ValueType) -> str:
        """Return the frozen factors' part, or the adapter."""
        return "factors" if role in (TENSOR_ROLE_LORA_A, TENSOR_ROLE_LORA_B) else ADAPTER
