"""The plan's adapter as PEFT knows it: its configuration, its trainable tensors by name, and its first version.

Tensors carry the names of PEFT's own state dict, with which ``PeftModel.from_pretrained`` finds them again, except for
P-tuning, whose encoder PEFT's export drops: there they are the raw parameters (``export.peft_tensors`` ends that).
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Final

from fsllm_common.errors import ModelUnusable

if TYPE_CHECKING:
    import torch
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel

    from fsllm_common.plan import Plan

PROMPT_KINDS: Final = ("prefix", "prompt", "p-tuning")
"""Kinds that prepend virtual tokens instead of adapting modules."""


def peft_config(plan: Plan, model: PreTrainedModel) -> PeftConfig:
    """Return the PEFT configuration of the plan's adapter on this base model.

    Raises:
        ModelUnusable: A target matches no module, or the kind does not go with this model.

    """
    from peft import IA3Config, LoraConfig, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, TaskType

    adapter = plan.adapter
    task = {"task_type": TaskType.CAUSAL_LM}
    match adapter.kind:
        case "lora" | "dora" | "rslora":
            return LoraConfig(
                **task,
                r=adapter.rank,
                lora_alpha=adapter.alpha,
                lora_dropout=adapter.dropout,
                target_modules=_targets(plan, model),
                use_dora=adapter.kind == "dora",
                use_rslora=adapter.kind == "rslora",
            )
        case "ia3":
            targets, feedforward = _ia3_targets(plan, model)
            return IA3Config(**task, target_modules=targets, feedforward_modules=feedforward)
        case "prefix":
            return PrefixTuningConfig(**task, num_virtual_tokens=adapter.virtual_tokens)
        case "prompt":
            return PromptTuningConfig(**task, num_virtual_tokens=adapter.virtual_tokens)
        case "p-tuning":
            return PromptEncoderConfig(
                **task,
                num_virtual_tokens=adapter.virtual_tokens,
                encoder_hidden_size=adapter.encoder_hidden_size,
            )


def _targets(plan: Plan, model: PreTrainedModel) -> str | list[str]:
    targets = plan.adapter.targets
    if targets == "all-linear":
        return targets
    _check_targets(targets, model)
    return sorted(targets)


def _check_targets(targets: Iterable[str], model: PreTrainedModel) -> None:
    """PEFT is content when one of several targets matches: a misspelt one would be left out without a word."""
    modules = [name for name, _ in model.named_modules()]
    missing = sorted(t for t in targets if not any(name == t or name.endswith(f".{t}") for name in modules))
    if missing:
        linear = {
            name.rpartition(".")[2] for name, module in model.named_modules() if type(module).__name__ == "Linear"
        }
        raise ModelUnusable(
            "MODEL_UNSUITABLE",
            f"adapter.targets: {', '.join(missing)} match no module of this {model.config.model_type} model; "
            f"its linear modules are {', '.join(sorted(linear)) or 'none'}",
        )


def _ia3_targets(plan: Plan, model: PreTrainedModel) -> tuple[list[str], list[str]]:
    """IA3's targets; 'all-linear' means the paper's: keys, values, feed-forward (Liu et al. 2022, arXiv 2205.05638)."""
    from peft.utils.constants import (
        TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING as FEEDFORWARD,
    )
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING as TARGETS

    kind = model.config.model_type
    if plan.adapter.targets != "all-linear":
        _check_targets(plan.adapter.targets, model)
        targets = sorted(plan.adapter.targets)
    elif kind in TARGETS:
        targets = sorted(TARGETS[kind])
    else:
        raise ModelUnusable(
            "MODEL_UNSUITABLE",
            f"adapter.targets: PEFT knows no IA3 targets for {kind} models",
            cure="Name the key, value and feed-forward output modules in adapter.targets.",
        )
    return targets, [target for target in targets if target in FEEDFORWARD.get(kind, ())]


def attach(plan: Plan, model: PreTrainedModel) -> PeftModel:
    """Return the base model with a new adapter on it, the adapter's parameters the only trainable ones.

    Raises:
        ModelUnusable: As ``peft_config``.

    """
    from peft import get_peft_model

    try:
        # In the model's own dtype: DeepSpeed keeps the float32 masters. PEFT would widen only LoRA's parameters.
        peft_model: PeftModel = get_peft_model(model, peft_config(plan, model), autocast_adapter_dtype=False)
    except ValueError as error:
        raise ModelUnusable(
            "MODEL_UNSUITABLE", f"PEFT can not put a {plan.adapter.kind} adapter on it: {error}"
        ) from error
    return peft_model


def adapter_parameters(model: PeftModel) -> dict[str, torch.nn.Parameter]:
    """Return the adapter's trainable parameters by the names under which they travel, in name order.

    The parameter objects themselves, which under ZeRO-3 hold no elements: use ``Engine.read_adapter`` for values.
    """
    from peft import get_peft_model_state_dict

    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    match model.active_peft_config.peft_type.value:
        case "PREFIX_TUNING" | "PROMPT_TUNING":
            (parameter,) = trainable.values()
            named = {"prompt_embeddings": parameter}
        case "P_TUNING":
            named = {name.replace(".default.", "."): parameter for name, parameter in trainable.items()}
        case _:
            # Given a state dict, PEFT only selects and renames its entries.
            named = get_peft_model_state_dict(model, state_dict=trainable, save_embedding_layers=False)
    if len(named) != len(trainable):
        unnamed = len(trainable) - len(named)
        raise ModelUnusable("MODEL_UNSUITABLE", f"{unnamed} trainable parameters have no place in PEFT's state dict")
    return dict(sorted(named.items()))


def initial_adapter(plan: Plan, model: PreTrainedModel) -> tuple[dict[str, torch.Tensor], str]:
    """Return version 0 of the adapter (float32, on CPU) and its configuration as JSON.

    The same bits on every site: drawn on CPU in float32 from the plan's seed, whatever device, precision, ZeRO stage
    and number of ranks the site trains with.

    Args:
        plan: The run's plan.
        model: The base model, on CPU in float32; it is changed. Only for DoRA do its weights matter.

    """
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(plan.seed)
        peft_model = attach(plan, model)
    if plan.adapter.kind == "dora":
        _exact_magnitudes(peft_model)
    tensors = {name: parameter.detach().clone() for name, parameter in adapter_parameters(peft_model).items()}
    return tensors, config_json(plan, peft_model)


def _exact_magnitudes(model: PeftModel) -> None:
    """Take DoRA's column norms of the base weight in float64: in float32 they depend on the processor's vector width.

    B is 0 in version 0, so the norm is the base weight's alone (Liu et al. 2024, arXiv 2402.09353, eq. 5).
    """
    import torch

    for module in model.modules():
        magnitudes = getattr(module, "lora_magnitude_vector", None)
        if magnitudes:
            weight = module.get_base_layer().weight
            norms = torch.linalg.vector_norm(weight.detach().double(), dim=1)
            magnitudes["default"].weight.data.copy_(norms)


def config_json(plan: Plan, model: PeftModel) -> str:
    """Return the adapter's PEFT configuration as JSON: keys and sets sorted, the model's name for the site's path."""
    config: dict[str, Any] = model.active_peft_config.to_dict()
    config.update(base_model_name_or_path=plan.model.name, inference_mode=True, revision=None)
    return json.dumps(config, sort_keys=True, default=_plain)


def _plain(value: object) -> object:
    if isinstance(value, set | frozenset):
        return sorted(value)
    raise TypeError(f"{type(value).__name__} has no place in an adapter's configuration")
