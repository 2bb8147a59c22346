"""LoRA-FAIR (Bian et al. 2024, arXiv 2411.14961), in closed form: A averaged, B the mean plus a correction.

dB = (W - B'A') A'^T (A'A'^T + lambda I)^-1 minimises |W - (B' + dB) A'|^2 + lambda |dB|^2 for W = sum_k p_k B_k A_k.
(The paper descends on a cosine instead.) W A'^T = sum_k p_k B_k (A_k A'^T), so that nothing of W's size is made.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field, PositiveFloat

from fsllm_common.algorithms.fedavg import FedAvg
from fsllm_common.algorithms.local_rule import Parameters

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from fsllm_common.algorithms.layers import Layer


class FairParameters(Parameters):
    """LoRA-FAIR's own."""

    ridge: PositiveFloat = Field(default=0.01, description="lambda: how much the correction of B is held back.")


class LoRAFair(FedAvg):
    """FedIT's bytes, and less of its bias."""

    name: ClassVar[str] = "lora-fair"
    departs = "the correction of B is found in closed form, by ridge regression, where the paper descends on a cosine"
    adapter_kinds: ClassVar[tuple[str, ...] | None] = ("lora", "rslora")
    any_rank: ClassVar[bool] = True
    parameters_type = FairParameters
    parameters: FairParameters
    needs_layers = True

    def combine_layer(self, layer: Layer) -> Mapping[str, npt.NDArray[np.float64]]:
        """Return the mean A and the corrected B."""
        if not layer.is_lora:
            return {}
        import numpy as np

        a, b = layer.mean("A"), layer.mean("B")
        gram = a @ a.T
        projected = -b @ gram
        for update in layer.updates:
            share = update.share * update.scale / layer.scale
            projected = projected + share * (update.tensors["B"] @ (update.tensors["A"] @ a.T))
        correction = np.linalg.solve(gram + self.parameters.ridge * np.eye(len(gram)), projected.T).T
        return {"A": a, "B": b + correction}
