"""Logits where an answer token is predicted, and nowhere else.

A language model's head costs as much as several of its layers: SmolLM2's is a fifth of the model, and the logits of
4 x 512 tokens fill 400 MB, several times over on the way to a loss. But prompts, padding and the like have no loss. So
the head is given the hidden states of the answers alone, by a hook before it: whatever the model does after its head
(a scale, a soft cap) is still done, and the gradients are those of the whole computation.

That the head is a module which is called on the hidden states of all positions is tried, not assumed (``check``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from peft import PeftModel


class AnswerLogits:
    """Calls a model for the logits that predict answer tokens.

    Args:
        model: The model with its adapter. A hook stays on its head and is without effect on all other calls.

    """

    def __init__(self, model: PeftModel) -> None:
        self._rows: torch.Tensor | None = None
        self._columns: torch.Tensor | None = None
        self._width = 0
        head = model.get_base_model().get_output_embeddings()
        self.selects = head is not None
        """Whether the head is spared the other positions. The results are the same."""
        if head is not None:
            head.register_forward_pre_hook(self._select)

    def __call__(
        self, forward: Callable[..., Any], inputs: Mapping[str, Any], labels: torch.Tensor, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return logits, float of shape (answer tokens, vocabulary), and targets, int64 of shape (answer tokens,).

        Args:
            forward: The model's forward pass.
            inputs: Its arguments, on the device.
            labels: (sequences, tokens) on the CPU, not shifted: position t is predicted from t - 1; -100 is no answer.
            device: Where the model is.

        """
        # Found out on the CPU: asking a GPU how many there are would wait for all that it has been given to do.
        rows, columns = (labels[:, 1:] != _IGNORED).nonzero(as_tuple=True)
        targets = labels[rows, columns + 1].to(device, non_blocking=True)
        rows, columns = rows.to(device, non_blocking=True), columns.to(device, non_blocking=True)
        if not self.selects:
            logits = forward(**inputs).logits
            return _at(logits, rows, columns, labels.shape[1]), targets
        self._rows, self._columns, self._width = rows, columns, labels.shape[1]
        try:
            return forward(**inputs).logits[0], targets
        finally:
            self._rows = self._columns = None

    def _select(self, head: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
        if self._rows is None or self._columns is None:
            return None
        hidden, *others = arguments
        return _at(hidden, self._rows, self._columns, self._width)[None], *others

    def check(self, model: Callable[..., Any], vocabulary: int, device: torch.device) -> bool:
        """Try it, and do without the hook from now on unless the logits are those of the whole computation.

        Args:
            model: In eval mode. Under ZeRO-3 every rank must make this call.
            vocabulary: The number of token ids, at least 8.
            device: Where the model is.

        """
        import torch

        ids = torch.randint(vocabulary, (2, 8), generator=torch.Generator().manual_seed(0))
        labels = ids.masked_fill(torch.arange(8) % 3 == 0, _IGNORED)
        inputs = {"input_ids": ids.to(device), "attention_mask": torch.ones_like(ids).to(device), "use_cache": False}
        with torch.no_grad():
            try:
                found, _ = self(model, inputs, labels, device)
            except (IndexError, RuntimeError, ValueError):  # the head is called on something else
                self.selects = False
                return False
            self.selects = False
            expected, _ = self(model, inputs, labels, device)
        # A wrong position moves logits by their own spread; other shapes of a product, in bfloat16, by far less.
        self.selects = found.shape == expected.shape and bool(
            (found - expected).abs().max() <= 0.05 * expected.float().std()
        )
        return self.selects


_IGNORED = -100


def _at(tensor: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, width: int) -> torch.Tensor:
    """Return (positions, features) of (sequences, virtual tokens + width, features): columns count from the width."""
    length = tensor.shape[1]
    return tensor.flatten(0, 1).index_select(0, rows * length + (length - width) + columns)


def summed_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the sum of the cross entropies, in float32. Shapes as ``AnswerLogits`` returns them."""
    import torch

    return torch.nn.functional.cross_entropy(logits.float(), targets, reduction="sum")


def token_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the summed cross entropy, in float32, of the labels that are not -100.

    Args:
        logits: (sequences, virtual tokens + tokens, vocabulary). Prompt and P-tuning put virtual tokens first.
        labels: (sequences, tokens), not shifted: position t is predicted from t - 1.

    """
    import torch

    width = labels.shape[1]
    predicted = logits[:, logits.shape[1] - width : -1].float()
    return torch.nn.functional.cross_entropy(
        predicted.reshape(-1, predicted.shape[-1]), labels[:, 1:].reshape(-1), ignore_index=-100, reduction="sum"
    )


def to_device(inputs: Mapping[str, object], device: torch.device) -> dict[str, object]:
    """Return a batch's inputs with their tensors on the device."""
    import torch

    # Without waiting for the copy: work on a GPU is done in the order in which it is given.
    return {
        name: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
        for name, value in inputs.items()
    }
