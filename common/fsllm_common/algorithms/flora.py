"""FLoRA (Wang et al. 2024, arXiv 2409.05976): stacked, [.. p_k s_k B_k ..][..; A_k; ..] = sum_k p_k s_k B_k A_k.

Exact for any ranks and scales, but for the wire's rounding. What the base gains goes into the ledger and is fetched by
everyone: the download grows with the number of sites.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from fsllm_common.algorithms.algorithm import Refusal
from fsllm_common.algorithms.base_delta import Ledger, fresh_a
from fsllm_common.algorithms.layers import OTHER_FACTORS

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from fsllm_common.algorithms.layers import Layer


class FLoRA(Ledger):
    """Stacking."""

    name: ClassVar[str] = "flora"
    adapter_kinds: ClassVar[tuple[str, ...] | None] = ("lora", "rslora")
    any_rank: ClassVar[bool] = True
    refuses: ClassVar[tuple[Refusal, ...]] = (OTHER_FACTORS,)

    def combine_layer(self, layer: Layer) -> Mapping[str, npt.NDArray[np.float64]]:
        """Put the stacked factors into the ledger, and begin again from nothing."""
        if not layer.is_lora:
            return {}
        return {"A": fresh_a(self.plan, layer), "B": layer.base["B"] * 0, **self.entry(layer, *layer.stacked())}
