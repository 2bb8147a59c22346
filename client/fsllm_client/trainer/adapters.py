"""The plan's adapter as PEFT knows it: its configuration, its trainable tensors by name, and its first version.

Tensors carry the names of PEFT's own state dict, with which ``PeftModel.from_pretrained`` finds them again, except for
three kinds that ``export.as_peft`` makes whole: P-tuning, whose encoder PEFT's export drops; LoRA-XS, which has a
matrix that PEFT does not know; and VeRA, whose projections need not travel.
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

LORA_KINDS: Final = ("lora", "dora", "rslora", "lora-xs")
"""Kinds that are, or are built on, PEFT's LoRA layers."""

WEIGHT_KINDS: Final = ("dora", "lora-xs")
"""Kinds whose first version depends on the base model's weights."""


def peft_config(plan: Plan, model: PreTrainedModel) -> PeftConfig:
    """Return the PEFT configuration of the plan's adapter on this base model.

    Raises:
        ModelUnusable: A target matches no module, or the kind does not go with this model.

    """
    from peft import (
        IA3Config,
        LoraConfig,
        OFTConfig,
        PrefixTuningConfig,
        PromptEncoderConfig,
        PromptTuningConfig,
        TaskType,
        VeraConfig,
    )

    adapter = plan.adapter
    task = {"task_type": TaskType.CAUSAL_LM}
    match adapter.kind:
        case "lora" | "dora" | "rslora" | "lora-xs":
            return LoraConfig(
                **task,
                r=adapter.rank,
                lora_alpha=adapter.alpha,
                lora_dropout=adapter.dropout,
                target_modules=_targets(plan, model),
                use_dora=adapter.kind == "dora",
                use_rslora=adapter.kind == "rslora",
            )
        case "vera":
            return VeraConfig(
                **task,
                r=adapter.rank,
                vera_dropout=adapter.dropout,
                target_modules=_targets(plan, model),
                projection_prng_key=plan.seed,
                save_projection=True,
            )
        case "oft":
            return OFTConfig(
                **task,
                oft_block_size=adapter.block_size,
                module_dropout=adapter.dropout,
                target_modules=_targets(plan, model),
                use_cayley_neumann=True,  # PEFT's default now, and another one in the past
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
    except (TypeError, ValueError) as error:
        raise ModelUnusable("MODEL_UNSUITABLE", f"PEFT can not put {plan.adapter.kind} on it: {error}") from error
    match plan.adapter.kind:
        case "lora-xs":
            from fsllm_client.trainer import lora_xs

            lora_xs.insert(peft_model)
        case "vera":
            _set_projections(plan, peft_model)
        case "oft":
            _check_blocks(plan, peft_model)
    return peft_model


def _set_projections(plan: Plan, model: PeftModel) -> None:
    """Put VeRA's portable projections in the place of those that PEFT has drawn."""
    import torch

    from fsllm_client.trainer.vera import projections

    # Of the whole model, not of a layer: all layers look into these two dictionaries.
    a, b = model.base_model.vera_A["default"], model.base_model.vera_B["default"]
    for mine, portable in zip((a, b), projections(plan.seed, plan.adapter.rank, a.shape[1], b.shape[0]), strict=True):
        mine.copy_(torch.from_numpy(portable))


def _check_blocks(plan: Plan, model: PeftModel) -> None:
    """PEFT takes another size of block, with a warning, for a layer whose inputs the plan's does not divide."""
    from peft.tuners.oft.layer import OFTLayer

    size = plan.adapter.block_size
    for name, layer in model.named_modules():
        if isinstance(layer, OFTLayer) and layer.in_features % size:
            raise ModelUnusable(
                "MODEL_UNSUITABLE",
                f"adapter.block_size: {size} does not divide the {layer.in_features} inputs of {name}",
                cure="Set adapter.block_size to a divisor of the inputs of every adapted layer.",
            )


def adapter_parameters(model: PeftModel) -> dict[str, torch.nn.Parameter]:
    """Return the adapter's parameters by the names under which they travel, in name order.

    Which of them a run trains is its method's to say: LoRA-XS's A and B are in a part that never moves.
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
        case "VERA":  # PEFT's own renaming looks for the projections too
            named = {name.removesuffix(".default"): parameter for name, parameter in trainable.items()}
        case "LORA" if any(_R in name for name in trainable):
            named = {_lora_xs_name(name): parameter for name, parameter in trainable.items()}
        case _:
            # Given a state dict, PEFT only selects and renames its entries.
            named = get_peft_model_state_dict(model, state_dict=trainable, save_embedding_layers=False)
    if len(named) != len(trainable):
        unnamed = len(trainable) - len(named)
        raise ModelUnusable("MODEL_UNSUITABLE", f"{unnamed} trainable parameters have no place in PEFT's state dict")
    return dict(sorted(named.items()))


_R = ".lora_B.default.lora_R."


def _lora_xs_name(name: str) -> str:
    """Return the name under which a parameter travels, R's a sibling of A's and B's: ``...q_proj.lora_R.weight``."""
    return name.replace(_R, ".lora_R.").replace(".default.lora_B.", ".").replace(".default.", ".")


def initial_adapter(plan: Plan, model: PreTrainedModel) -> tuple[dict[str, torch.Tensor], str]:
    """Return version 0 of the adapter (float32, on CPU) and its configuration as JSON.

    The same bits on every site: drawn on CPU in float32 from the plan's seed, whatever device, precision, ZeRO stage
    and number of ranks the site trains with.

    Args:
        plan: The run's plan.
        model: The base model, on CPU in float32; it is changed. Its weights matter for ``WEIGHT_KINDS`` only.

    """
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(plan.seed)
        peft_model = attach(plan, model)
    if plan.adapter.kind == "dora":
        _exact_magnitudes(peft_model)
    elif plan.adapter.kind == "lora-xs":
        from fsllm_client.trainer import lora_xs

        lora_xs.decompose(peft_model, plan.seed)
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
    if plan.adapter.kind == "vera":
        from fsllm_client.trainer.vera import INPUTS

        config[INPUTS] = model.base_model.vera_A["default"].shape[1]
    return json.dumps(config, sort_keys=True, default=_plain)


def _plain(value: object) -> object:
    if isinstance(value, set | frozenset):
        return sorted(value)
    raise TypeError(f"{type(value).__name__} has no place in an adapter's configuration")
