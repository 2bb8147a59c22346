"""One optimizer step of the local training, as a rule sees it: ``LocalStep`` over an engine and a step's batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from fsllm_client.trainer.answers import summed_loss, to_device, token_losses
from fsllm_client.trainer.preference import log_probabilities
from fsllm_common.algorithms import LocalRule, changes

if TYPE_CHECKING:
    import torch

    from fsllm_client.data.batches import Batch, Step
    from fsllm_client.trainer.engine import Engine
    from fsllm_client.trainer.group import Group


class EngineStep:
    """A step in the making: see ``algorithms.LocalStep``.

    Args:
        engine: With what is not trained in this turn frozen.
        rule: Whose hooks go with the step.
        step: This rank's batches.
        group: The ranks.
        number: 1, 2, ... in its turn.
        learning_rate: The round's.

    """

    def __init__(
        self, engine: Engine, rule: LocalRule, step: Step, group: Group, number: int, learning_rate: float
    ) -> None:
        self._engine = engine
        self._rule = rule
        self._step = step
        self._group = group
        self.number = number
        self.learning_rate = learning_rate
        self._sums: list[torch.Tensor] = []
        self.norm = 0.0
        """Of the ordinary step's gradient."""
        self.summed: float | None = None
        """This rank's part of the step's loss, summed over its tokens, as it was first computed."""
        self._preferences = engine.plan.data.format == "preference"
        if self._preferences:  # before the step's first pass: ZeRO-3 would forget gradients for another model's pass
            engine.reference.see(step.micro_batches, group)

    def values(self) -> dict[str, torch.Tensor]:
        """Return the adapter as it is."""
        adapter = self._engine.read_adapter()
        return {name: adapter[name] for name in self._engine.moved}

    def write(self, values: Mapping[str, torch.Tensor]) -> None:
        """Set these tensors of the adapter."""
        self._engine.write_adapter(values)

    def loss(self) -> float:
        """Return the mean loss over the step's answer tokens, without dropout and without a gradient."""
        import torch

        model = self._engine.model
        model.eval()
        try:
            with torch.no_grad():
                for loss in self._losses(model):
                    loss()
        finally:
            model.train()
        (summed,) = self._group.total(self._sum())
        return summed / max(1, self._step.answer_tokens)

    def gradients(self) -> dict[str, torch.Tensor]:
        """Return the gradient of the step's mean loss, and leave adapter and optimizer as they are."""
        gradients = self._engine.gradients(self._losses(self._engine.forward))
        self._sum()
        return gradients

    def step(self) -> None:
        """Take the ordinary optimizer step, clipping and the rule's other hooks included."""
        rule = self._rule
        self.norm = self._engine.step(
            self._losses(self._engine.forward),
            after_backward=rule.after_backward if changes(rule, "after_backward") else None,
            after_step=rule.after_step if changes(rule, "after_step") else None,
        )
        self._sum()

    def gradient_of(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the gradient, in the step just taken, of a tensor that is the rule's own (``LocalRule.inside``)."""
        import torch

        gradient = tensor.grad.clone() if tensor.grad is not None else torch.zeros_like(tensor)
        tensor.grad = None
        if self._group.world > 1:
            torch.distributed.all_reduce(gradient)
        return gradient / self._group.world  # see ``Engine``: each rank's loss was multiplied for DeepSpeed's mean

    def _losses(self, forward: Callable[..., Any]) -> list[Callable[[], torch.Tensor]]:
        """Return the step's passes, as many as the engine accumulates; the added ones do not count.

        A site with fewer sequences than the plan's batch has fewer passes a step than its engine was made for.
        """
        batches = [(batch, True) for batch in self._step.micro_batches]
        batches += [(self._step.micro_batches[-1], False)] * (self._engine.passes - len(batches))
        return [partial(self._loss, forward, batch, counts) for batch, counts in batches]

    def _loss(self, forward: Callable[..., Any], batch: Batch, counts: bool) -> torch.Tensor:
        """Return a pass's part of the step's loss: its tokens' losses over the answer tokens of ALL passes, ranks."""
        device = self._engine.device
        if self._preferences:
            policy = log_probabilities(self._engine.answers, forward, batch, device)
            loss = self._rule.pair_loss(policy, self._engine.reference.of(batch, device))
            return self._share(loss, loss, counts)
        inputs = dict(batch.inputs)
        labels: torch.Tensor = inputs.pop("labels")
        inputs = to_device(inputs, self._engine.device)
        if changes(self._rule, "loss"):  # it may look at every logit
            labels = labels.to(self._engine.device)
            logits = forward(**inputs).logits
            loss = token_losses(logits, labels)
            wanted = self._rule.loss(loss, labels, logits)
        else:
            loss = wanted = summed_loss(*self._engine.answers(forward, inputs, labels, self._engine.device))
        return self._share(loss, wanted, counts)

    def _share(self, loss: torch.Tensor, wanted: torch.Tensor, counts: bool) -> torch.Tensor:
        """Note a pass's summed loss, and return its part of the mean that is differentiated."""
        if not counts:
            return loss * 0.0
        self._sums.append(loss.detach().double())
        return wanted / max(1, self._step.answer_tokens)

    def _sum(self) -> float:
        """Return what the passes just made add up to at this rank."""
        import torch

        summed = float(torch.stack(self._sums).sum()) if self._sums else 0.0
        self._sums.clear()
        if self.summed is None:
            self.summed = summed
        return summed
