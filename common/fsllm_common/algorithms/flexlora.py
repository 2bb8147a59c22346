"""FlexLoRA (Bai et al. 2024, arXiv 2402.11505): W = sum_k p_k s_k B_k A_k, cut by SVD to every site's own rank.

The SVD is that of a core of the size of the ranks' sum; W itself is only
formed where it is no larger than that core in one of its dimensions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from fsllm_common.algorithms.algorithm import Refusal
from fsllm_common.algorithms.fedavg import FedAvg
from fsllm_common.algorithms.layers import OTHER_FACTORS, truncated_svd

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from fsllm_common.algorithms.layers import Layer


class FlexLoRA(FedAvg):
    """B = U S / s and A = V^T of the plan's rank; a site of rank r gets their first r columns and rows."""

    name: ClassVar[str] = "flexlora"
    adapter_kinds: ClassVar[tuple[str, ...] | None] = ("lora", "rslora")
    needs_layers = True
    any_rank: ClassVar[bool] = True
    refuses: ClassVar[tuple[Refusal, ...]] = (OTHER_FACTORS,)

    def combine_layer(self, layer: Layer) -> Mapping[str, npt.NDArray[np.float64]]:
        """Return the best approximation of the mean product."""
        if not layer.is_lora:
            return {}
        wide, tall = truncated_svd(*layer.stacked(), layer.base["A"].shape[0])
        return {"A": tall, "B": wide / layer.scale}
