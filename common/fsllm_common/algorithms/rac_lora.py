"""RAC-LoRA (Malinovsky et al. 2024, arXiv 2410.08305): each round a fresh frozen A, B trained from 0 and averaged.

W0 <- W0 + sum_k p_k s_k B_k A goes into the ledger, of A's rank: exact, but for the wire's rounding. A chain of such
steps reaches the full-parameter solution.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from fsllm.v1.tensors_pb2 import TENSOR_ROLE_LORA_A
from fsllm_common.algorithms.algorithm import ADAPTER, LORA_A, Refusal
from fsllm_common.algorithms.base_delta import Ledger, fresh_a
from fsllm_common.algorithms.layers import OTHER_FACTORS

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from fsllm.v1.tensors_pb2 import TensorRole
    from fsllm_common.algorithms.layers import Layer


class RACLoRA(Ledger):
    """A chain of asymmetric adapters."""

    name: ClassVar[str] = "rac-lora"
    adapter_kinds: ClassVar[tuple[str, ...] | None] = ("lora", "rslora")
    any_rank: ClassVar[bool] = True
    refuses: ClassVar[tuple[Refusal, ...]] = (OTHER_FACTORS,)

    def part(self, role: TensorRole.ValueType) -> str:
        """Return A's part, or the adapter."""
        return LORA_A if role == TENSOR_ROLE_LORA_A else super().part(role)

    def remade(self, round_: int) -> tuple[str, ...]:
        """Return both: A is drawn anew."""
        return (ADAPTER, LORA_A)

    def added_rank(self, ranks: Sequence[int]) -> int:
        """Return that of A."""
        return self.plan.adapter.rank

    def combine_layer(self, layer: Layer) -> Mapping[str, npt.NDArray[np.float64]]:
        """Put the mean product into the ledger and begin the next link of the chain."""
        if not layer.is_lora:
            return {}
        wide = layer.base["B"] * 0
        for update in layer.updates:
            b = update.tensors["B"]
            # A smaller rank's A is the first rows of this one.
            wide[:, : b.shape[1]] += update.share * update.scale * b
        gained = self.entry(layer, wide, layer.base["A"])
        return {"A": fresh_a(self.plan, layer), "B": layer.base["B"] * 0, **gained}
