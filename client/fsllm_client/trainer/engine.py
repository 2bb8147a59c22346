"""The DeepSpeed engine of a run: a PEFT model under ZeRO 1, 2 or 3, whose adapter can be written, read and trained.

It is made once and reused by every round. What fails in silence here, and is therefore done by this file and nowhere
else:

- ``safe_set_full_fp32_param`` alone sets the float32 masters and leaves the forward pass on the old adapter until the
  next step; setting only the parameters is undone by the next step. ``write_adapter`` sets both.
- Under ZeRO-3 parameters hold no elements outside of the forward pass: ``read_adapter`` gathers the masters.
- DeepSpeed's ``safe_set_full_*`` fail under ZeRO-3 for a tensor that the ranks do not divide evenly: ``_set_local``
  pads.
- With an offloaded optimizer DeepSpeed takes the gradient's norm during the backward pass, so that clipping would not
  see what a rule changes afterwards: with such a rule the norm and the clipping are ours.
- A forward pass that does not go through DeepSpeed's engine lets ZeRO-3 forget the gradients of all passes but the last
  of a step: training calls ``forward``.
- The optimizer has no state before its first step (in some versions of DeepSpeed, one step's worth):
  ``write_optimizer`` and the constructor see to both.
- A parameter without a gradient is not left alone: an optimizer with momentum or weight decay moves it none the less.
  ``freeze`` sees to that, and to the gradient's norm.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fsllm_client.trainer.answers import AnswerLogits
from fsllm_client.trainer.preference import Reference
from fsllm_common.errors import ModelUnusable

if TYPE_CHECKING:
    import torch
    from peft import PeftModel

    from fsllm_common.plan import Plan

_log = logging.getLogger(__name__)

GradientChange = Callable[[str, "torch.Tensor", "torch.Tensor"], "torch.Tensor"]
"""(name, gradient, value) -> the gradient to take; whole tensors in float32."""

ValueChange = Callable[[str, "torch.Tensor"], "torch.Tensor"]
"""(name, value) -> the value to go on with; whole tensors in float32."""


class Engine:
    """A PEFT model under DeepSpeed.

    Args:
        model: The model with its adapter, on CPU (or partitioned already, under ZeRO-3).
        parameters: The adapter's parameters by name (``adapters.adapter_parameters``).
        plan: The run's plan.
        config: DeepSpeed's configuration (``ds_config.deepspeed_config``).
        device: Where it trains.
        fixed: Those of them that are never trained: written and read like the others, they cost no more than that.

    """

    def __init__(
        self,
        model: PeftModel,
        parameters: Mapping[str, torch.nn.Parameter],
        plan: Plan,
        config: dict[str, Any],
        device: torch.device,
        fixed: Collection[str] = (),
    ) -> None:
        import deepspeed

        self.plan = plan
        self.device = device
        self.stage: int = config["zero_optimization"]["stage"]
        self.passes: int = config["gradient_accumulation_steps"]
        self.adapter = dict(parameters)
        """All of the adapter's parameters, by name."""
        self.parameters = {name: parameter for name, parameter in parameters.items() if name not in fixed}
        """Those that are trained."""
        self._fixed: dict[str, torch.Tensor] = {}
        self._frozen: dict[str, torch.Tensor] = {}
        self._frozen_moments: dict[str, torch.Tensor] = {}
        for name in fixed:
            parameters[name].requires_grad_(False)
        self.answers = AnswerLogits(model)
        self.reference = Reference(model, self.answers)
        self._clips_itself = config["gradient_clipping"] == 0 and plan.train.max_grad_norm > 0
        if plan.train.gradient_checkpointing:
            try:
                # The kind that torch recommends; it needs no input that wants a gradient, which a frozen base has not.
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            except ValueError as error:
                raise ModelUnusable(
                    "MODEL_UNSUITABLE",
                    f"train.gradient_checkpointing: {model.config.model_type} models can not do it",
                    cure="Set train.gradient_checkpointing to false.",
                ) from error
        offloaded = (config["zero_optimization"].get("offload_optimizer") or {}).get("device") == "cpu"
        self._engine, self._optimizer, _, _ = deepspeed.initialize(
            model=model,
            optimizer=_optimizer(plan, list(self.parameters.values()), offloaded=offloaded, device=device),
            model_parameters=list(self.parameters.values()),
            config=config,
            dist_init_required=False,
        )
        self.reset_optimizer()

    @property
    def model(self) -> PeftModel:
        """The PEFT model, to measure with. Call it on every rank: under ZeRO-3 a forward pass is everyone's."""
        model: PeftModel = self._engine.module
        return model

    def forward(self, **inputs: Any) -> Any:  # noqa: ANN401 (the model's own)
        """Run the model's forward pass, to train. Call it on every rank."""
        return self._engine(**inputs)

    def close(self) -> None:
        """Give back what the engine holds."""
        self._engine.destroy()

    # The adapter.

    def write_adapter(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Make ``tensors`` (whole, the same on every rank) the adapter, for the forward pass and for the optimizer.

        Those that are not given stay.
        """
        import deepspeed
        import torch

        written = {name: parameter for name, parameter in self.adapter.items() if name in tensors}
        with torch.no_grad():
            for name, parameter in written.items():
                if name in self.parameters:
                    self._set_local(parameter, tensors[name].to(self.device, torch.float32))
                else:
                    self._fixed[name] = tensors[name]
            with deepspeed.zero.GatheredParameters(list(written.values()), modifier_rank=0):
                for name, parameter in written.items():
                    parameter.data.copy_(tensors[name].reshape(parameter.shape))

    def read_adapter(self) -> dict[str, torch.Tensor]:
        """Return the adapter's float32 masters, whole, on CPU. Call it on every rank."""
        from deepspeed.utils import safe_get_full_fp32_param

        masters = {
            name: safe_get_full_fp32_param(parameter).detach().float().cpu().clone()
            for name, parameter in self.parameters.items()
        }
        return {name: masters[name] if name in masters else self._fixed[name] for name in self.adapter}

    def freeze(self, names: Collection[str]) -> None:
        """Leave these tensors, and their optimizer state, exactly as they are until told otherwise.

        Those frozen before are let go. Call it on every rank, after the adapter and the optimizer were written.
        """
        import torch

        self._set_moments(self._frozen_moments)
        adapter = self.read_adapter() if names else {}
        self._frozen = {name: adapter[name] for name in self.parameters if name in names}
        self._frozen_moments = {}
        if self._frozen and self._has_state:
            # Without moments and a gradient the optimizer moves nothing (but for weight decay: see ``step``).
            keeps = self.plan.train.optimizer_state == "keep"
            self._frozen_moments = self._moments(self._frozen) if keeps else {}
            self._set_moments(
                {f"{m}/{n}": torch.zeros_like(tensor) for m in _MOMENTS for n, tensor in self._frozen.items()}
            )

    @property
    def _has_state(self) -> bool:
        return self.plan.train.optimizer == "adamw" and any(self._optimizer.optimizer.state.values())

    def _set_local(self, parameter: torch.nn.Parameter, value: torch.Tensor, state: str | None = None) -> None:
        """Set this rank's part of a parameter's float32 master, or of an optimizer state of it."""
        from deepspeed import utils

        if self.stage < 3:
            if state is None:
                utils.safe_set_full_fp32_param(parameter, value)
            else:
                utils.safe_set_full_optimizer_state(parameter, value, state)
        elif state is None:
            utils.safe_set_local_fp32_param(parameter, self._partition(parameter, value))
        else:
            utils.safe_set_local_optimizer_state(parameter, self._partition(parameter, value), state)

    def _partition(self, parameter: torch.nn.Parameter, value: torch.Tensor) -> torch.Tensor:
        """Return this rank's part of a whole tensor as ZeRO-3 cuts it: equal parts, the last one padded."""
        import torch

        size = int(parameter.ds_tensor.numel())  # type: ignore[attr-defined]  # DeepSpeed adds it
        flat = value.flatten()
        padded = torch.nn.functional.pad(flat, (0, size * self._world - flat.numel()))
        return padded[size * self._rank : size * (self._rank + 1)]

    @property
    def _rank(self) -> int:
        import torch

        return torch.distributed.get_rank()

    @property
    def _world(self) -> int:
        import torch

        return torch.distributed.get_world_size()

    # The optimizer.

    def reset_optimizer(self) -> None:
        """Make the optimizer as if new, and freeze nothing."""
        self._frozen, self._frozen_moments = {}, {}
        self._zero_optimizer()

    def _zero_optimizer(self) -> None:
        import torch

        for state in self._optimizer.optimizer.state.values():
            for key, value in state.items():
                if isinstance(value, torch.Tensor):
                    value.zero_()  # in place: DeepSpeed holds views of it
                else:
                    state[key] = 0

    def read_optimizer(self) -> dict[str, torch.Tensor]:
        """Return the optimizer's state, whole, on CPU: each ``moment/name``, and ``step``. Call it on every rank."""
        import torch

        if self.plan.train.optimizer == "sgd":
            return {}
        steps = [state["step"] for state in self._optimizer.optimizer.state.values() if "step" in state]
        return {**self._moments(self.parameters), **self._frozen_moments, "step": torch.tensor([int(steps[0])])}

    def _moments(self, names: Collection[str]) -> dict[str, torch.Tensor]:
        from deepspeed.utils import safe_get_full_optimizer_state

        return {
            f"{moment}/{name}": safe_get_full_optimizer_state(self.parameters[name], moment)
            .detach()
            .float()
            .cpu()
            .clone()
            for moment in _MOMENTS
            for name in names
        }

    def _set_moments(self, moments: Mapping[str, torch.Tensor]) -> None:
        import torch

        with torch.no_grad():
            for key, value in moments.items():
                moment, _, name = key.partition("/")
                self._set_local(self.parameters[name], value.to(self.device), moment)

    def write_optimizer(self, states: Mapping[str, torch.Tensor]) -> None:
        """Set the optimizer's state to what ``read_optimizer`` returned, perhaps with other ranks and another stage."""
        import torch

        if self.plan.train.optimizer == "sgd":
            return
        self.reset_optimizer()
        self._step_on_the_spot()
        self._set_moments({key: value for key, value in states.items() if key != "step"})
        step = int(states["step"].item())
        for state in self._optimizer.optimizer.state.values():
            if isinstance(state.get("step"), torch.Tensor):
                state["step"].fill_(step)
            elif "step" in state:
                state["step"] = step

    def _step_on_the_spot(self) -> None:
        """Take a step that moves nothing, after which the optimizer has a state to be set.

        CPU Adam keeps powers of beta of its own, multiplied from step to step or computed anew after a jump, which
        differ by rounding: from here on they are the same whatever this process has trained before.
        """
        import torch

        rate, was_training = self._optimizer.param_groups[0]["lr"], self.model.training
        self.set_learning_rate(0.0)
        self.model.eval()  # without dropout no random number is drawn
        ids = torch.zeros((1, 2), dtype=torch.long, device=self.device)
        self.step([lambda: self.forward(input_ids=ids, use_cache=False).logits.sum() * 0.0] * self.passes)
        self.model.train(was_training)
        self.set_learning_rate(rate)

    def set_learning_rate(self, rate: float) -> None:
        """Set the learning rate of the steps to come."""
        for group in self._optimizer.param_groups:
            group["lr"] = rate

    # A step.

    def step(
        self,
        losses: Sequence[Callable[[], torch.Tensor]],
        *,
        after_backward: GradientChange | None = None,
        after_step: ValueChange | None = None,
    ) -> float:
        """Take one optimizer step on the sum of the losses over all passes and ranks, and return its gradient's norm.

        Args:
            losses: One forward pass each, as many as ``passes``, the same number on every rank.
            after_backward: Changes each parameter's gradient, before it is clipped.
            after_step: Changes each parameter after the step.

        Returns:
            The norm before clipping; infinite or NaN when some gradient is. The step is then taken none the less (so
            that the engine is left at a step's end), and the adapter and the optimizer hold nothing of use.

        """
        self._backward(losses)
        ours = after_backward or self._clips_itself or self._frozen
        norm = self._change_gradients(after_backward) if ours else None
        self._engine.step()
        if norm is None:
            found = self._engine.get_global_grad_norm()
            # DeepSpeed's sign for a gradient that is not finite is -1 or None.
            norm = float(found) if found is not None and found >= 0 else float("nan")
        if self._frozen and self.plan.train.weight_decay > 0:
            self.write_adapter(self._frozen)
        if after_step is not None:
            adapter = self.read_adapter()
            self.write_adapter({name: after_step(name, adapter[name]) for name in self.moved})
        return norm

    def gradients(self, losses: Sequence[Callable[[], torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Return the gradients of the sum of the losses over all passes and ranks, and take no step.

        Args:
            losses: As for ``step``.

        Returns:
            Whole, in float32, on CPU, of what is not frozen.

        """
        from deepspeed.utils import safe_get_full_grad

        if self.plan.train.optimizer == "adamw" and not self._has_state:
            # After its first step DeepSpeed looks for the state, and never again.
            self._step_on_the_spot()
            self._zero_optimizer()
        self._backward(losses)
        found = {name: safe_get_full_grad(self.parameters[name]).detach().float().cpu().clone() for name in self.moved}
        optimizer = self._optimizer.optimizer
        # DeepSpeed goes through a step's end, which lets go of the gradients, with an optimizer that does nothing.
        optimizer.step = lambda *_, **__: None
        try:
            self._engine.step()
        finally:
            del optimizer.step
        return found

    @property
    def moved(self) -> list[str]:
        """The names of what is neither fixed nor frozen."""
        return [name for name in self.parameters if name not in self._frozen]

    def _backward(self, losses: Sequence[Callable[[], torch.Tensor]]) -> None:
        for loss in losses:
            # DeepSpeed averages over passes and ranks.
            self._engine.backward(loss() * (self.passes * self._world))
            if not self._engine.is_gradient_accumulation_boundary():
                self._engine.step()

    def _change_gradients(self, change: GradientChange | None) -> float:
        import torch
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad

        gradients = {}
        for name in self.moved:
            parameter = self.parameters[name]
            gradient = safe_get_full_grad(parameter).detach().float()
            gradients[name] = (
                gradient if change is None else change(name, gradient, safe_get_full_fp32_param(parameter))
            )
        norm = float(torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in gradients.values()])))
        limit = self.plan.train.max_grad_norm
        scale = min(1.0, limit / (norm + 1e-6)) if limit > 0 else 1.0
        for name, gradient in gradients.items():
            self._set_gradient(self.parameters[name], gradient * scale)
        for name, value in self._frozen.items():
            self._set_gradient(self.parameters[name], torch.zeros_like(value, device=self.device))
        return norm

    def _set_gradient(self, parameter: torch.nn.Parameter, value: torch.Tensor) -> None:
        from deepspeed import utils

        if self.stage < 3:
            utils.safe_set_full_grad(parameter, value)
        else:
            utils.safe_set_local_grad(parameter, self._partition(parameter, value))


_MOMENTS = ("exp_avg", "exp_avg_sq")


def _optimizer(
    plan: Plan, parameters: list[torch.nn.Parameter], *, offloaded: bool, device: torch.device
) -> torch.optim.Optimizer:
    import torch

    train = plan.train
    if train.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=train.learning_rate, weight_decay=train.weight_decay)
    if offloaded:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        cpu_adam: torch.optim.Optimizer = DeepSpeedCPUAdam(
            parameters, lr=train.learning_rate, weight_decay=train.weight_decay, adamw_mode=True
        )
        return cpu_adam
    return torch.optim.AdamW(
        parameters, lr=train.learning_rate, weight_decay=train.weight_decay, fused=device.type == "cuda"
    )
