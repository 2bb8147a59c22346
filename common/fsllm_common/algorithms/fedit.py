"""FedIT (Zhang et al. 2023, arXiv 2305.05644): A and B averaged apart, A' = sum_k p_k A_k and B' = sum_k p_k B_k.

Their product B'A' is not the mean of the products: a biased baseline. docs/algorithms.md has methods that are exact.
"""

from __future__ import annotations

from typing import ClassVar

from fsllm_common.algorithms.fedavg import FedAvg


class FedIT(FedAvg):
    """FedAvg on LoRA's factors, which is what plain FedAvg does to a LoRA adapter."""

    name: ClassVar[str] = "fedit"
    adapter_kinds: ClassVar[tuple[str, ...] | None] = ("lora", "dora", "rslora")
    any_rank: ClassVar[bool] = True
