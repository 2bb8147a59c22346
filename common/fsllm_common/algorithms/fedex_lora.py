"""FedEx-LoRA (Singhal et al. 2024, arXiv 2410.09432): A and B averaged apart, and what that misses added to the base.

W0 <- W0 + sum_k p_k s B_k A_k - s B'A', of rank (K + 1) r, goes into the ledger: exact, but for the wire's rounding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from fsllm_common.algorithms.base_delta import Ledger

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from fsllm_common.algorithms.layers import Layer


class FedExLoRA(Ledger):
    """FedIT with its error made good."""

    name: ClassVar[str] = "fedex-lora"
    adapter_kinds: ClassVar[tuple[str, ...] | None] = ("lora", "rslora")
    any_rank: ClassVar[bool] = True

    def added_rank(self, ranks: Sequence[int]) -> int:
        """Return that of the sites' products and of the mean's."""
        return sum(ranks) + self.plan.adapter.rank

    def combine_layer(self, layer: Layer) -> Mapping[str, npt.NDArray[np.float64]]:
        """Return the means, and the residual for the ledger."""
        if not layer.is_lora:
            return {}
        import numpy as np

        a, b = layer.mean("A"), layer.mean("B")
        wide, tall = layer.stacked()
        residual = np.concatenate([wide, -layer.scale * b], axis=1), np.concatenate([tall, a])
        return {"A": a, "B": b, **self.entry(layer, *residual)}
