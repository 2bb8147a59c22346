"""From the adapter that sites exchange to the one that ``PeftModel.from_pretrained`` reads. Needs only numpy.

They are the same for most kinds. What differs:

- P-tuning: PEFT's own export keeps the encoder's output and drops the encoder, so that no two of them could be
  averaged. The sites exchange the encoder's raw parameters, and only the final adapter is reduced to what PEFT loads.
- LoRA-XS: PEFT knows no R. It is multiplied into B, which makes an ordinary LoRA of the same rank and scale.
- VeRA: the shared projections follow from the plan's seed and do not travel; PEFT finds them in the file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fsllm_client.trainer import vera
from fsllm_common.algorithms.base_delta import gained

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Array = npt.NDArray[np.float32]

_ENCODER = "prompt_encoder."
_R = ".lora_R.weight"


def as_peft(tensors: Mapping[str, Array], config: Mapping[str, Any]) -> tuple[dict[str, Array], dict[str, Any]]:
    """Return the tensors to save as ``adapter_model.safetensors``, and the configuration to save beside them.

    Args:
        tensors: An adapter's tensors by name, as the sites exchange them.
        config: Its PEFT configuration, as it came with version 0.

    """
    if any("/" in name for name in tensors):
        return _with_base_delta(tensors, config)
    if any(name.startswith(_ENCODER) for name in tensors):
        return _prompt(tensors), dict(config)
    if vera.is_vera(config):
        return vera.with_projections(tensors, config)
    return _without_r(tensors), dict(config)


def _with_base_delta(
    tensors: Mapping[str, Array], config: Mapping[str, Any]
) -> tuple[dict[str, Array], dict[str, Any]]:
    """Return a LoRA that holds what the base has gained, too: s [B, U / s] [A; V] = s B A + U V.

    What a method adds besides (``Algorithm.extra``) is of no use without it, and is left out.
    """
    import numpy as np

    adapter = {name: tensor for name, tensor in tensors.items() if "/" not in name}
    ledger = gained(tensors)
    if not ledger:
        return as_peft(adapter, config)
    s = config["lora_alpha"] / (math.sqrt(config["r"]) if config.get("use_rslora") else config["r"])
    rank = 0
    for module, entries in ledger.items():
        a, b = f"{module}.lora_A.weight", f"{module}.lora_B.weight"
        adapter[a] = np.concatenate([adapter[a], *(tall for _, tall in entries)])
        adapter[b] = np.concatenate([adapter[b], *(wide / np.float32(s) for wide, _ in entries)], axis=1)
        rank = adapter[a].shape[0]
    return adapter, {**config, "r": rank, "lora_alpha": s * rank, "use_rslora": False}


def _without_r(tensors: Mapping[str, Array]) -> dict[str, Array]:
    """Return a LoRA-XS adapter as a LoRA: B' = B R. Any other is returned as it is."""
    import numpy as np

    merged = {name: tensor for name, tensor in tensors.items() if not name.endswith(_R)}
    for name, r in tensors.items():
        if name.endswith(_R):
            b = f"{name.removesuffix(_R)}.lora_B.weight"
            merged[b] = np.ascontiguousarray(tensors[b] @ r, dtype=np.float32)
    return merged


def _prompt(tensors: Mapping[str, Array]) -> dict[str, Array]:
    """Return what PEFT's PromptEncoder of kind MLP gives: embedding, then linear, ReLU, linear, ReLU, linear."""
    import numpy as np

    hidden = tensors[f"{_ENCODER}embedding.weight"]  # (virtual tokens, width)
    for layer in (0, 2, 4):
        weight, bias = (tensors[f"{_ENCODER}mlp_head.{layer}.{part}"] for part in ("weight", "bias"))
        hidden = hidden @ weight.T + bias
        if layer < 4:
            hidden = np.maximum(hidden, 0)
    return {"prompt_embeddings": np.ascontiguousarray(hidden, dtype=np.float32)}
