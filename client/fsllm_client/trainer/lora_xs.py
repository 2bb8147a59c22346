"""LoRA-XS (Balazy et al. 2024, arXiv 2405.17604): W + s B R A, where only R (rank x rank) is trained.

A and B come from the weight's own truncated SVD, W ~ U S V': A = V' (rank, inputs) and B = U S (outputs, rank), which
is W A'. R begins as 0 (the paper: as noise of deviation 1e-5), so that version 0 is the base model exactly; its
gradient does not vanish for that, as B and A are not 0.

A singular value decomposition is unique up to the signs of the vectors, and not even so much where singular values are
equal. So A and B are worked out by the one site that builds version 0, travel with it once, and are taken from it by
all others. Those still work them out to check version 0 against their own base model: in float64, from the same random
start and with the signs fixed, two machines differ by rounding alone, far below what the check allows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fsllm_common.errors import ModelUnusable
from fsllm_common.philox import uniform

if TYPE_CHECKING:
    from peft import PeftModel

_ADAPTER = "default"
_SPARE = 10
_ITERATIONS = 10  # as many as the paper's own code has its randomised SVD do


class _Between(nn.Module):
    """Stands in the place of a LoRA layer's B: first R, then B."""

    def __init__(self, b: nn.Linear, rank: int) -> None:
        super().__init__()
        self.lora_R = nn.Linear(rank, rank, bias=False, dtype=b.weight.dtype, device=b.weight.device)
        nn.init.zeros_(self.lora_R.weight)
        self.lora_B = b

    @property
    def weight(self) -> torch.Tensor:
        """What PEFT takes for B's weight where it merges."""
        return self.lora_B.weight @ self.lora_R.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply R, then B."""
        projected: torch.Tensor = self.lora_B(self.lora_R(x))
        return projected


def insert(model: PeftModel) -> None:
    """Put R into each layer of a LoRA model. That A and B are in a part that never moves is the algorithm's to say."""
    for name, layer in _layers(model):
        if not layer.lora_A:
            raise ModelUnusable("MODEL_UNSUITABLE", f"lora-xs can not adapt {name}, which is no linear layer")
        layer.lora_B[_ADAPTER] = _Between(layer.lora_B[_ADAPTER], layer.r[_ADAPTER])


def decompose(model: PeftModel, seed: int) -> None:
    """Set A and B of each layer from the weight that it adapts. The base model must be on the CPU and whole.

    Raises:
        ModelUnusable: The rank is larger than a weight allows.

    """
    for name, layer in _layers(model):
        weight = layer.get_base_layer().weight.detach()
        if layer.fan_in_fan_out:
            weight = weight.T
        rank = layer.r[_ADAPTER]
        if rank > min(weight.shape):
            raise ModelUnusable(
                "MODEL_UNSUITABLE",
                f"adapter.rank: {name} has a weight of {weight.shape[0]} x {weight.shape[1]}, which has no {rank} "
                "singular vectors",
            )
        a, b = factors(weight, rank, seed)
        layer.lora_A[_ADAPTER].weight.data.copy_(a)
        layer.lora_B[_ADAPTER].lora_B.weight.data.copy_(b)


def factors(weight: torch.Tensor, rank: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A, (rank, inputs), with orthonormal rows, and B = W A', (outputs, rank), with orthogonal columns; float64.

    By subspace iteration (Halko et al. 2011, arXiv 0909.4061, algorithm 4.4), which costs seconds where a whole SVD
    costs minutes. The largest element of each row of A is positive.
    """
    w = weight.double()
    width = min(rank + _SPARE, *w.shape)
    basis = torch.from_numpy(uniform((w.shape[1], width), 1.0, seed)).double()
    for _ in range(_ITERATIONS):
        left, _ = torch.linalg.qr(w @ basis)
        basis, _ = torch.linalg.qr(w.T @ left)
    # W within the subspace: its right singular vectors, turned back, are W's.
    _, _, turned = torch.linalg.svd(w @ basis, full_matrices=False)
    a = (basis @ turned[:rank].T).T
    largest = a.gather(1, a.abs().argmax(1, keepdim=True))
    a = a * torch.where(largest < 0, -1.0, 1.0)
    return a, w @ a.T


def _layers(model: PeftModel) -> list[tuple[str, Any]]:
    """Return the model's LoRA layers, of whose attributes torch's own annotations would know nothing."""
    from peft.tuners.lora import LoraLayer

    return [(name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)]
