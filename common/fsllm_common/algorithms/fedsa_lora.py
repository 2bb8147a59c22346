"""FedSA-LoRA (Guo et al. 2024, arXiv 2410.01463): A and B are trained, A is averaged, B stays at its site.

So each site has a model of its own: there is no global one to export, and none for an evaluator to measure.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from fsllm.v1.tensors_pb2 import TENSOR_ROLE_LORA_B
from fsllm_common.algorithms.algorithm import ADAPTER
from fsllm_common.algorithms.fedavg import FedAvg

if TYPE_CHECKING:
    from fsllm.v1.tensors_pb2 import TensorRole


class FedSALoRA(FedAvg):
    """B is personal: version 0's is where each site begins."""

    name: ClassVar[str] = "fedsa-lora"
    adapter_kinds: ClassVar[tuple[str, ...] | None] = ("lora", "dora", "rslora")
    any_rank: ClassVar[bool] = True
    personal: frozenset[TensorRole.ValueType] = frozenset({TENSOR_ROLE_LORA_B})

    def part(self, role: TensorRole.ValueType) -> str:
        """Return B's part, or the adapter."""
        return "lora_B" if role == TENSOR_ROLE_LORA_B else ADAPTER
