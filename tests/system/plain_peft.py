"""An exported adapter as anybody would use it: plain transformers and PEFT, nothing of ours but the rows' template."""

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from fsllm_bench.embedded import model_path
from fsllm_client.data.site_data import load_site_data
from fsllm_client.data.tokenise import Encoded
from fsllm_client.trainer.base_model import load_tokenizer
from fsllm_common.plan import Plan


def validation(rows: Path, plan: dict[str, Any]) -> list[Encoded]:
    """Return the examples that a site with these rows measures."""
    asked = Plan.model_validate(plan)
    return load_site_data(rows, asked, load_tokenizer(model_path()), "site").validation[: asked.evaluate.limit]


def mix(model: PeftModel, folder: Path) -> None:
    """Have an adapter's layers mix it with the one in ``rest``: a(x) s B A x + (1 - a(x)) s B' A' x, as FedALT does."""
    rest = load_file(folder / "rest" / "adapter_model.safetensors")
    for name, gate in load_file(folder / "mixer.safetensors").items():
        layer, a, b = model.get_submodule(name), rest[f"{name}.lora_A.weight"], rest[f"{name}.lora_B.weight"]

        def forward(x: Any, layer: Any = layer, gate: Any = gate, a: Any = a, b: Any = b) -> Any:  # noqa: ANN401
            share = (x @ gate.T).softmax(-1)[..., :1]
            own = layer.lora_B["default"](layer.lora_A["default"](x))
            return layer.base_layer(x) + layer.scaling["default"] * (share * own + (1 - share) * (x @ a.T @ b.T))

        layer.forward = forward


def measure(adapter: Path, examples: list[Encoded]) -> float:
    """Return the mean loss over the examples' answer tokens."""
    base = AutoModelForCausalLM.from_pretrained(model_path(), dtype=torch.float32)
    model = PeftModel.from_pretrained(base, adapter).eval()
    if (adapter / "mixer.safetensors").exists():
        mix(model, adapter)
    total, tokens = 0.0, 0
    for example in examples:
        ids, labels = (torch.tensor(each[None].astype("int64")) for each in (example.input_ids, example.labels))
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, -ids.shape[1] :]
        total += float(
            torch.nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:], ignore_index=-100, reduction="sum")
        )
        tokens += example.answer_tokens
    return total / tokens
