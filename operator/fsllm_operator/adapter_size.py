"""How many parameters a plan's adapter has, by arithmetic on the base model's config.json: no torch, no weights.

Known are the decoder families whose linear layers follow from their configuration. A family that is not here is no
error of the user's: the caller asks for the number instead.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple

from fsllm_common.algorithms import FACTORS
from fsllm_common.errors import ModelUnusable
from fsllm_common.plan.schema import Adapter

Config = Mapping[str, Any]

_OUTSIDE: Final = frozenset({"lm_head", "embed_tokens", "embed_in", "embed_out", "wte", "wpe"})
_IA3_TARGETS: Final[dict[str, tuple[str, ...]]] = {
    **dict.fromkeys(("llama", "mistral"), ("k_proj", "v_proj", "down_proj")),
    **dict.fromkeys(("qwen2", "qwen3", "gemma", "gemma2"), ("q_proj", "v_proj", "down_proj")),
    "gpt_neox": ("query_key_value", "dense_4h_to_h"),
}
"""What PEFT's IA3 adapts where a plan says all-linear."""


class Linear(NamedTuple):
    """One linear layer of every decoder block."""

    name: str
    inputs: int
    outputs: int
    scaled_input: bool = False
    """IA3 scales what goes into it, not what comes out."""


def adapter_parameters(adapter: Adapter, config: Config) -> int | None:
    """Return how many parameters travel for ``adapter`` on a model of this configuration; None when unknown.

    Raises:
        ModelUnusable: MODEL_UNSUITABLE: a target of the plan is no linear layer of the model, or a size is missing.

    """
    with _understood(config):
        return _parameters(adapter, config)


def _parameters(adapter: Adapter, config: Config) -> int | None:
    family = _FAMILIES.get(str(config.get("model_type")))
    if family is None:
        return None
    blocks, hidden, tokens = _layers(config), _hidden(config), adapter.virtual_tokens
    match adapter.kind:
        case "prompt":
            return tokens * hidden
        case "prefix":
            return tokens * blocks * 2 * _key_value_width(config)
        case "p-tuning":
            # The encoder: an embedding, then three linear layers with biases.
            width = adapter.encoder_hidden_size
            return tokens * hidden + (hidden + 1) * width + (width + 1) * width + (width + 1) * hidden
    if adapter.kind == "ia3":
        chosen = _IA3_TARGETS.get(str(config["model_type"]))
        if chosen is None:
            return None
        if adapter.targets == "all-linear":
            adapter = adapter.model_copy(update={"targets": chosen})
    if adapter.kind == "oft" and config["model_type"] == "gpt2":  # PEFT has no rotation for its kind of layer
        return None
    layers = _targeted(adapter, family(config))
    if layers is None:
        return None
    return blocks * sum(_of_layer(adapter, layer) for layer in layers)


def adapter_shapes(adapter: Adapter, config: Config) -> dict[str, tuple[int, ...]] | None:
    """Return the shapes of a LoRA's factors under names of our own; None for other adapters, or where unknown.

    Raises:
        ModelUnusable: MODEL_UNSUITABLE: a target of the plan is no linear layer of the model, or a size is missing.

    """
    with _understood(config):
        return _shapes(adapter, config)


def _shapes(adapter: Adapter, config: Config) -> dict[str, tuple[int, ...]] | None:
    family = _FAMILIES.get(str(config.get("model_type")))
    if family is None or adapter.kind not in FACTORS or (layers := _targeted(adapter, family(config))) is None:
        return None
    shapes: dict[str, tuple[int, ...]] = {}
    for block in range(_layers(config)):
        for at, layer in enumerate(layers):
            module = f"{block}.{at}.{layer.name}"
            shapes[f"{module}.lora_A.weight"] = (adapter.rank, layer.inputs)
            shapes[f"{module}.lora_B.weight"] = (layer.outputs, adapter.rank)
            if adapter.kind == "dora":
                shapes[f"{module}.lora_magnitude_vector"] = (layer.outputs,)
    return shapes


def _of_layer(adapter: Adapter, layer: Linear) -> int:
    match adapter.kind:
        case "ia3":
            return layer.inputs if layer.scaled_input else layer.outputs
        case "vera":
            return adapter.rank + layer.outputs
        case "lora-xs":
            return adapter.rank**2  # A and B travel once, with version 0
        case "oft":
            # The halves of skew-symmetric matrices, one a block. A size that does not divide is refused by the sites.
            return (layer.inputs // adapter.block_size) * (adapter.block_size * (adapter.block_size - 1) // 2)
        case _:
            # A is rank x inputs, B is outputs x rank; DoRA adds a magnitude for each output.
            magnitudes = layer.outputs if adapter.kind == "dora" else 0
            return adapter.rank * (layer.inputs + layer.outputs) + magnitudes


def read_config(folder: Path) -> Config:
    """Return the config.json of a model folder.

    Raises:
        ModelUnusable: MODEL_MISSING: there is none, or it is not a JSON object.

    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelUnusable(
            "MODEL_MISSING", f"{path} does not exist", cure="Name a folder that holds a model's config.json."
        ) from error
    except (OSError, ValueError) as error:
        raise ModelUnusable(
            "MODEL_MISSING", f"{path} can not be read as JSON", cure="Name a folder that holds a model's config.json."
        ) from error
    if not isinstance(config, dict):
        raise ModelUnusable(
            "MODEL_MISSING", f"{path} is not a JSON object", cure="Name a folder that holds a model's config.json."
        )
    return config


@contextmanager
def _understood(config: Config) -> Iterator[None]:
    """Say what is wrong with a configuration that lacks a number, or has something else in its place."""
    try:
        yield
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        what = f"{error} is not in it" if isinstance(error, KeyError) else str(error)
        raise ModelUnusable(
            "MODEL_UNSUITABLE",
            f"the model's config.json has no layers of a {config.get('model_type')} that can be counted: {what}",
            cure="Give the folder of a whole model, or the adapter's size: --parameters COUNT.",
        ) from error


def _targeted(adapter: Adapter, linears: tuple[Linear, ...]) -> list[Linear] | None:
    names = {linear.name for linear in linears}
    targets = adapter.targets
    if targets == "all-linear":
        return list(linears)
    # A dotted target fits some modules of the name only; those outside the blocks are not listed here.
    if any("." in target or target in _OUTSIDE for target in targets):
        return None
    for target in targets:
        if target not in names:
            raise ModelUnusable(
                "MODEL_UNSUITABLE",
                f"adapter.targets: {target!r} is no linear layer of this model; there are {', '.join(sorted(names))}",
            )
    return [linear for linear in linears if linear.name in targets]


def _hidden(config: Config) -> int:
    return int(config["hidden_size"] if "hidden_size" in config else config["n_embd"])


def _layers(config: Config) -> int:
    return int(config["num_hidden_layers"] if "num_hidden_layers" in config else config["n_layer"])


def _heads(config: Config) -> int:
    return int(config["num_attention_heads"] if "num_attention_heads" in config else config["n_head"])


def _head_width(config: Config) -> int:
    return int(config.get("head_dim") or _hidden(config) // _heads(config))


def _key_value_width(config: Config) -> int:
    return int(config.get("num_key_value_heads") or _heads(config)) * _head_width(config)


def _llama(config: Config) -> tuple[Linear, ...]:
    hidden, inner = _hidden(config), int(config["intermediate_size"])
    query, key_value = _heads(config) * _head_width(config), _key_value_width(config)
    return (
        Linear("q_proj", hidden, query),
        Linear("k_proj", hidden, key_value),
        Linear("v_proj", hidden, key_value),
        Linear("o_proj", query, hidden),
        Linear("gate_proj", hidden, inner),
        Linear("up_proj", hidden, inner),
        Linear("down_proj", inner, hidden, scaled_input=True),
    )


def _gpt2(config: Config) -> tuple[Linear, ...]:
    hidden = _hidden(config)
    inner = int(config.get("n_inner") or 4 * hidden)
    return (
        Linear("c_attn", hidden, 3 * hidden),
        # Two layers of a block share this name.
        Linear("c_proj", hidden, hidden),
        Linear("c_fc", hidden, inner),
        Linear("c_proj", inner, hidden),
    )


def _gpt_neox(config: Config) -> tuple[Linear, ...]:
    hidden, inner = _hidden(config), int(config["intermediate_size"])
    return (
        Linear("query_key_value", hidden, 3 * hidden),
        Linear("dense", hidden, hidden),
        Linear("dense_h_to_4h", hidden, inner),
        Linear("dense_4h_to_h", inner, hidden, scaled_input=True),
    )


_FAMILIES: Final[dict[str, Callable[[Config], tuple[Linear, ...]]]] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "smollm3", "olmo", "olmo2"), _llama),
    "gpt2": _gpt2,
    "gpt_neox": _gpt_neox,
}
