"""What both sides share: model, rows, plan, and how many examples make a step."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, Final

from fsllm_bench.embedded import model_path
from fsllm_bench.training import rows
from fsllm_client.data.packing import arrange
from fsllm_client.data.site_data import SiteData, load_site_data
from fsllm_common.errors import DataInvalid
from fsllm_common.plan import Plan

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FILL: Final = 0.9
"""Of the longest sequence: room for the template."""

_LEAST_STEPS: Final = 2


@dataclass(frozen=True, slots=True)
class Setting:
    """One comparison. A pass of either side sees every training example once."""

    model: Path
    data: Path
    plan: Plan
    folder: Path
    """Where the two sides leave their adapters."""
    passes: int
    """Over the data, the warm-up included."""
    examples: int
    answer_tokens: int
    tokens: int
    packed_tokens: int
    """With the padding of the client's sequences."""
    padded_tokens: int
    """With the padding of the plain Trainer's batches, on average over orders."""
    steps: int
    """Of the client, in a pass."""
    examples_a_step: int
    """Of the plain Trainer: as many as the client's packed steps hold on average."""


def default_model() -> Path:
    """Return SmolLM2's folder where ``make smollm2`` has put it, else the embedded model's."""
    smollm2 = Path(os.environ.get("VIRTUAL_ENV", ".venv")) / "models" / "smollm2"
    return smollm2.resolve() if (smollm2 / "config.json").is_file() else model_path()


def make(
    model: Path,
    data: Path | None,
    folder: Path,
    *,
    examples: int,
    batch: int,
    passes: int,
    seed: int,
    precision: str,
    fields: dict[str, str] | None = None,
) -> Setting:
    """Write the rows and choose the plan.

    The client's steps are so many packed sequences as hold about as many examples as the plain Trainer's. The last rows
    are left out until packed sequences fill whole steps, and both sides take equally many: then a pass of either holds
    each example exactly once, and the two can be compared after the same number of examples and of steps.

    Args:
        model: The base model's folder.
        data: A jsonl file to take rows from; generated ones when None.
        folder: For the files.
        examples: Rows to train on, about; a fifth more is held out.
        batch: Examples a step, about.
        passes: Over the data, the warm-up included.
        seed: Of the rows, the adapter and the order of the batches.
        precision: bf16 or fp32.
        fields: How the file's fields are named: ours to theirs.

    Raises:
        DataInvalid: The file has too few rows.

    """
    from fsllm_client.trainer.base_model import load_tokenizer

    tokenizer = load_tokenizer(model)
    settings = json.loads((model / "config.json").read_text())
    plan = _plan(seed, precision, min(512, settings["max_position_embeddings"]), fields or {})
    wanted = math.ceil(examples / (1 - plan.data.validation_fraction))
    lines = (
        [json.dumps(row) for row in rows.make(wanted, seed, _most_events(tokenizer, plan.data.max_length))]
        if data is None
        else [line for line in data.read_text(encoding="utf-8").splitlines() if line.strip()][:wanted]
    )
    path = folder / "rows.jsonl"
    size: int | None = None
    while len(lines) > _LEAST_STEPS * batch:
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        loaded, sequences = _packed(path, plan, tokenizer)
        if size is None:
            size = max(1, round(batch * len(sequences) / len(loaded.train)))
            plan = plan.model_copy(update={"train": plan.train.model_copy(update={"batch_size": size})})
        steps = len(sequences) // size
        share = math.ceil(len(loaded.train) / max(1, steps))
        if len(sequences) % size == 0 and math.ceil(len(loaded.train) / share) == steps:
            lengths = [len(example) for example in loaded.train]
            return Setting(
                model=model.resolve(),
                data=path.resolve(),
                plan=plan,
                folder=folder.resolve(),
                passes=passes,
                examples=len(loaded.train),
                answer_tokens=sum(example.answer_tokens for example in loaded.train),
                tokens=sum(lengths),
                packed_tokens=len(sequences) * plan.data.max_length,
                padded_tokens=_padded(lengths, share, seed),
                steps=steps,
                examples_a_step=share,
            )
        lines.pop()
    raise DataInvalid(f"{data}: {wanted} rows are wanted, and there are too few")


def _most_events(tokenizer: PreTrainedTokenizerBase, max_length: int) -> int:
    """Return how many events the longest row may tell of, so that (nearly) none has to be cut."""

    def tokens(events: int) -> int:
        day = rows.row(events, Random(0))  # noqa: S311  # a specimen
        return len(tokenizer(f"{day['instruction']} {day['input']} {day['output']}", verbose=False)["input_ids"])

    return max((n for n in range(1, rows.MOST_EVENTS + 1) if tokens(n) <= _FILL * max_length), default=1)


def _packed(path: Path, plan: Plan, tokenizer: PreTrainedTokenizerBase) -> tuple[SiteData, list[tuple[Any, ...]]]:
    loaded = load_site_data(path, plan, tokenizer, "site")
    return loaded, arrange(loaded.train, packed=True, max_length=plan.data.max_length, seed=plan.seed)


def _padded(lengths: list[int], batch: int, seed: int, orders: int = 100) -> int:
    """Return the tokens of batches in random order that are padded to their longest, on average."""
    rng = Random(seed)  # noqa: S311  # an estimate
    total = 0
    for _ in range(orders):
        rng.shuffle(lengths)
        batches = (lengths[start : start + batch] for start in range(0, len(lengths), batch))
        total += sum(max(part) * len(part) for part in batches)
    return round(total / orders)


def _plan(seed: int, precision: str, max_length: int, fields: dict[str, str]) -> Plan:
    return Plan.model_validate(
        {
            "name": "training",
            "seed": seed,
            "rounds": 100,
            "model": {"name": "model"},
            "adapter": {"kind": "lora", "rank": 8, "alpha": 16},
            "train": {
                "steps": None,
                "epochs": 1.0,
                "learning_rate": 5e-4,
                "precision": precision,
                "optimizer_state": "keep",
            },
            "deepspeed": {"zero_stage": 2, "offload_optimizer": True},
            "data": {"template": "brief", "max_length": max_length, "validation_fraction": 0.2, "fields": fields},
            "evaluate": {"metrics": ["loss"]},
        }
    )
