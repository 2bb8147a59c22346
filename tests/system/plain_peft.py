"""An exported adapter as anybody would use it: plain transformers and PEFT, nothing of ours but the rows' template."""

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
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


def measure(adapter: Path, examples: list[Encoded]) -> float:
    """Return the mean loss over the examples' answer tokens."""
    base = AutoModelForCausalLM.from_pretrained(model_path(), dtype=torch.float32)
    model = PeftModel.from_pretrained(base, adapter).eval()
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
