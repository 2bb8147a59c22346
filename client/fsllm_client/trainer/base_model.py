"""The base model and its tokenizer, from a folder of this host and from nowhere else."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fsllm_common.errors import InputError, ModelUnusable, SettingsInvalid
from fsllm_common.plan.schema import Quantization

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model")

_REPACKING = "support_avx512bf16_for_cpu"
"""Of bitsandbytes' four-bit layers. Where the CPU knows bfloat16, the first pass without gradients lays their weights
out anew, for products that let no gradient through: whoever trains after measuring would train on half a gradient, and
never hear of it. It also fails where a weight's outputs are no multiple of 32."""


def check_folder(folder: Path) -> None:
    """Look for what a model folder must hold. Needs no torch.

    Raises:
        ModelUnusable: MODEL_MISSING when the folder, its configuration, weights or tokenizer are absent.

    """
    if not folder.is_dir():
        raise ModelUnusable("MODEL_MISSING", f"the model folder {folder} does not exist")
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise ModelUnusable("MODEL_MISSING", f"the model folder {folder} has no config.json")
    if not any(folder.glob("*.safetensors")):
        other = "; its weights are of another format" if any(folder.glob("*.bin")) or any(folder.glob("*.gguf")) else ""
        raise ModelUnusable(
            "MODEL_MISSING",
            f"the model folder {folder} has no *.safetensors{other}",
            cure="Save the model as safetensors (save_pretrained does) in the folder that the site's policy names.",
        )
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise ModelUnusable(
            "MODEL_MISSING", f"the model folder {folder} has no tokenizer (one of {', '.join(_TOKENIZER_FILES)})"
        )


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer.

    Raises:
        ModelUnusable: MODEL_UNSUITABLE when transformers can not read it.

    """
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise _unsuitable(folder, "tokenizer", error) from error
    return tokenizer


def load_model(
    folder: Path, dtype: torch.dtype, quantization: Quantization = "none", device: torch.device | str = "cpu"
) -> PreTrainedModel:
    """Load the causal language model on to the CPU (or partitioned, when ZeRO-3's configuration is announced).

    Args:
        folder: The model's.
        dtype: Of its weights, and of all that is computed.
        quantization: How the weights of its linear layers are held (not the head's): they are quantised as they are
            read, never trained, and nothing that travels depends on them but through what was trained on them.
        device: Where a quantised model is put at once, so that the whole one need not fit anywhere.

    Raises:
        ModelUnusable: MODEL_UNSUITABLE when transformers can not read it as a causal language model, or a weight is
            missing.
        InputError: TRAINER_MISSING when bitsandbytes is needed and not installed.
        SettingsInvalid: A quantised model under ZeRO-3.

    """
    from transformers import AutoModelForCausalLM

    more = _quantized(quantization, dtype, device) if quantization != "none" else {}
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            **more,
        )
    except (OSError, ValueError, KeyError) as error:
        raise _unsuitable(folder, "model", error) from error
    # transformers only warns, and goes on with random numbers.
    if missing := sorted(info["missing_keys"]):
        raise ModelUnusable(
            "MODEL_UNSUITABLE", f"the weights in {folder} lack {len(missing)} tensors, e.g. {missing[0]}"
        )
    for module in model.modules():
        if hasattr(module, _REPACKING):
            setattr(module, _REPACKING, False)
    loaded: PreTrainedModel = model
    return loaded


def _quantized(
    quantization: Literal["nf4", "int8"], dtype: torch.dtype, device: torch.device | str
) -> dict[str, object]:
    """Return what transformers takes to load a quantised model."""
    from transformers import BitsAndBytesConfig
    from transformers.integrations import is_deepspeed_zero3_enabled

    if importlib.util.find_spec("bitsandbytes") is None:
        raise InputError(
            "TRAINER_MISSING",
            f"model.quantization: {quantization} needs bitsandbytes, which is not installed",
            cure="Install it: pip install 'fsllm[quantize]'.",
        )
    if is_deepspeed_zero3_enabled():  # by the site's own JSON; a plan that says so is refused
        raise SettingsInvalid(
            f"deepspeed_config: ZeRO stage 3 cuts weights up, which those of model.quantization: {quantization} do not "
            "survive",
            cure="Use stage 1 or 2 for this plan.",
        )
    # It says of every product in bfloat16, again and again, that it is computed in float16.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    # QLoRA's own setting (Dettmers et al. 2023, arXiv 2305.14314): NormalFloat, its constants quantised in turn.
    config = (
        BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
        if quantization == "nf4"
        else BitsAndBytesConfig(load_in_8bit=True)
    )
    return {"quantization_config": config, "device_map": {"": device}}


def shape_of_model(folder: Path) -> PreTrainedModel:
    """Return the model with its shapes and no weights: float32 on the CPU, of memory that is never touched.

    For building the first version of an adapter that does not look at the weights, however large the model.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                config, dtype=torch.float32, trust_remote_code=False
            )
    except (OSError, ValueError, KeyError) as error:
        raise _unsuitable(folder, "model", error) from error
    model.to_empty(device="cpu")
    return model


def _unsuitable(folder: Path, what: Literal["model", "tokenizer"], error: Exception) -> ModelUnusable:
    first_line = next(iter(str(error).splitlines()), type(error).__name__)
    return ModelUnusable("MODEL_UNSUITABLE", f"transformers can not read the {what} in {folder}: {first_line}")


def vocabulary(model: Any) -> int:  # noqa: ANN401 (a PreTrainedModel or a PeftModel)
    """Return the number of token ids."""
    return int(model.config.get_text_config().vocab_size)
