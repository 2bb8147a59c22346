"""FFA-LoRA (Sun et al. 2024, arXiv 2403.12313): A stays as it was drawn, B is trained and averaged.

The mean of the products is the product of the mean, exactly; half the bytes travel, and noise does not multiply noise.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from fsllm.v1.tensors_pb2 import TENSOR_ROLE_LORA_A
from fsllm_common.algorithms.algorithm import ADAPTER, LORA_A
from fsllm_common.algorithms.fedavg import FedAvg

if TYPE_CHECKING:
    from fsllm.v1.tensors_pb2 import TensorRole


class FFALoRA(FedAvg):
    """A is a part of its own, which never moves: it is fetched once."""

    name: ClassVar[str] = "ffa-lora"
    adapter_kinds: ClassVar[tuple[str, ...] | None] = ("lora", "dora", "rslora")
    any_rank: ClassVar[bool] = True

    def part(self, role: TensorRole.ValueType) -> str:
        """Return A's part, or the adapter."""
        return LORA_A if role == TENSOR_ROLE_LORA_A else ADAPTER
