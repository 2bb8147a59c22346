"""What a run has added to the base weights so far, as factors beside them: y += U (V x) in each module.

The base model's own weights stay as they are, in four bits too, and hold no gradient for it. Plain tensors rather than
parameters: the same on every rank, under every ZeRO stage, and unknown to the optimizer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fsllm_common.algorithms.base_delta import gained

if TYPE_CHECKING:
    import torch
    from peft import PeftModel


class BaseDelta:
    """The ledger's entries, applied in the forward pass of the modules that they name.

    Args:
        model: Whose modules' names the entries carry.
        device: Where it computes.

    """

    def __init__(self, model: PeftModel, device: torch.device) -> None:
        self._model = model
        self._device = device
        self._factors: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self._hooked: set[str] = set()

    def install(self, extra: Mapping[str, torch.Tensor]) -> None:
        """Apply these entries from now on, and no others.

        Args:
            extra: A version's tensors besides the adapter's; those that are no ledger's are passed over.

        """
        import torch

        entries = gained(extra)
        self._factors = {
            module: (
                torch.cat([wide for wide, _ in pairs], dim=1).to(self._device),
                torch.cat([tall for _, tall in pairs]).to(self._device),
            )
            for module, pairs in entries.items()
        }
        for module in entries.keys() - self._hooked:
            self._model.get_submodule(module).register_forward_hook(self._hook(module))
            self._hooked.add(module)

    def _hook(self, module: str) -> Any:  # noqa: ANN401 (torch's own type of hooks is as wide)
        import torch

        def add(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
            if (factors := self._factors.get(module)) is None:
                return output
            wide, tall = (factor.to(output.dtype) for factor in factors)
            added = torch.nn.functional.linear(torch.nn.functional.linear(inputs[0].to(output.dtype), tall), wide)
            return output + added

        return add
