"""Preferences: the log-probabilities of pairs of answers, by the model as it is and by the base model without adapter.

The base model is what a method compares with (the reference policy of DPO, arXiv 2305.18290). It is the same model with
its adapter switched off, so no second one is held; and as it never changes, each pair is looked at once in a run.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fsllm_client.trainer.answers import AnswerLogits, to_device
from fsllm_common.errors import TrainingFailed

if TYPE_CHECKING:
    import torch
    from peft import PeftModel

    from fsllm_client.data.batches import Batch
    from fsllm_client.data.tokenise import Encoded
    from fsllm_client.trainer.group import Group


def log_probabilities(
    answers: AnswerLogits, forward: Callable[..., Any], batch: Batch, device: torch.device
) -> torch.Tensor:
    """Return (pairs, 2), float32: the log-probability of each pair's chosen and rejected answer, given its prompt.

    Of a batch without pairs, which a rank computes to keep step with the others, the rows are none and hang on the
    model none the less.
    """
    import torch

    inputs: Mapping[str, Any] = {name: value for name, value in batch.inputs.items() if name != "labels"}
    labels: torch.Tensor = batch.inputs["labels"]
    logits, targets = answers(forward, to_device(inputs, device), labels, device)
    losses = torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none")
    rows, _ = (labels[:, 1:] != -100).nonzero(as_tuple=True)
    summed = losses.new_zeros(len(labels)).index_add(0, rows.to(device), losses)
    return -summed.reshape(-1, 2)[: len(batch.pairs)] + 0.0 * summed.sum()


class Reference:
    """What the base model says of preferences, each computed once.

    Args:
        model: The model with its adapter.
        answers: Its head's.

    """

    def __init__(self, model: PeftModel, answers: AnswerLogits) -> None:
        self._model = model
        self._answers = answers
        self._known: dict[Encoded, tuple[float, float]] = {}

    def see(self, batches: Sequence[Batch], group: Group) -> None:
        """Compute what is not known of these batches, as many on every rank. Call it on every rank."""
        import torch

        missing = any(pair not in self._known for batch in batches for pair in batch.pairs)
        if not group.total(float(missing))[0]:
            return
        was_training = self._model.training
        self._model.eval()
        try:
            with torch.no_grad(), without_adapter(self._model) as forward:
                for batch in batches:
                    found = log_probabilities(self._answers, forward, batch, group.device)
                    for pair, (chosen, rejected) in zip(batch.pairs, found.tolist(), strict=True):
                        self._known[pair] = (chosen, rejected)
        finally:
            self._model.train(was_training)

    def of(self, batch: Batch, device: torch.device) -> torch.Tensor:
        """Return (pairs, 2), float32, for a batch that was seen."""
        import torch

        return torch.tensor([self._known[pair] for pair in batch.pairs], device=device).reshape(-1, 2)


@contextlib.contextmanager
def without_adapter(model: PeftModel) -> Iterator[Callable[..., Any]]:
    """Yield the base model's forward pass.

    PEFT's own ``disable_adapter`` also marks what is to be trained anew, which DeepSpeed has settled.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    if model.active_peft_config.is_prompt_learning:
        yield model.get_base_model()
        return
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield model
    finally:
        for layer in layers:
            layer._disable_adapters = False


def measure(
    model: PeftModel,
    answers: AnswerLogits,
    reference: Reference,
    pair_loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    batches: Sequence[Batch],
    group: Group,
    advance: Callable[[int], None],
) -> tuple[dict[str, float], int]:
    """Return the method's loss a pair and the share of pairs whose margin is positive, and the number of pairs.

    The margin is what the chosen answer has gained in log-probability on the base model, less the rejected one's gain.

    Args:
        model: With its adapter, in eval mode. Call it on every rank.
        answers: Its head's.
        reference: The base model's.
        pair_loss: The rule's.
        batches: All ranks'.
        group: The ranks.
        advance: Called with the pairs of each batch that are done.

    Raises:
        TrainingFailed: LOSS_NOT_FINITE.

    """
    import torch

    summed, right, pairs = 0.0, 0.0, 0.0
    for batch, counts in group.share(batches):
        reference.see([batch], group)
        with torch.no_grad():
            policy = log_probabilities(answers, model, batch, group.device)
        base = reference.of(batch, group.device)
        if counts:
            gained = policy - base
            summed += float(pair_loss(policy, base).double())
            right += float((gained[:, 0] > gained[:, 1]).sum())
            pairs += len(batch.pairs)
        advance(len(batch.pairs) if counts else 0)
    summed, right, pairs = group.total(summed, right, pairs)
    loss = summed / max(1.0, pairs)
    if not math.isfinite(loss):
        raise TrainingFailed("LOSS_NOT_FINITE", "the loss on the validation pairs is not a finite number")
    return {"loss": loss, "reward_accuracy": right / max(1.0, pairs)}, int(pairs)
