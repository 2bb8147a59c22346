"""The demo's plans, written as YAML files that a reader may take as a start for real ones."""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fsllm_bench.demo.data import POOLED, SITES

EVALUATOR = "evaluator"

_EMBEDDED: dict[str, Any] = {
    "rounds": 6,
    "model": {"name": "embedded"},
    "adapter": {"kind": "lora", "rank": 8, "alpha": 16},
    "algorithm": {"name": "fedavg", "weighting": "examples"},
    "train": {
        "steps": 12,
        "batch_size": 8,
        "learning_rate": 3e-3,
        "precision": "fp32",
        "optimizer_state": "reset",
    },
    "deepspeed": {"zero_stage": 2, "offload_optimizer": True},
    "data": {"template": "brief", "max_length": 64, "packing": True, "validation_fraction": 0.1},
    "evaluate": {"metrics": ["loss", "exact_match"], "limit": 400, "max_new_tokens": 8},
    "wire": {"element_type": "fp32"},
    "timing": {"gather_seconds": 1.0, "idle_seconds": 120},
}

_SMOLLM2: dict[str, Any] = deepcopy(_EMBEDDED) | {
    "rounds": 2,
    "model": {"name": "smollm2"},
    "train": {"steps": 6, "batch_size": 4, "learning_rate": 5e-4, "precision": "fp32", "optimizer_state": "reset"},
    "data": {"template": "tokenizer", "max_length": 256, "packing": True, "validation_limit": 8},
    "evaluate": {"metrics": ["loss", "exact_match"], "limit": 16, "max_new_tokens": 100, "normalizer": "gsm8k"},
    "wire": {"element_type": "bf16"},
    "timing": {"gather_seconds": 1.0, "idle_seconds": 600, "evaluate_seconds": 3600},
}


@dataclass(frozen=True)
class Plans:
    """The plan files of one demo.

    A site alone takes as many steps as it takes in the federation, and the pool as many as all its sites together.
    """

    federation: Path
    alone: Mapping[str, Path]
    pooled: Path


def write(
    folder: Path,
    model: str,
    seed: int,
    *,
    rounds: int | None,
    steps: int | None,
    fields: Mapping[str, str],
    normalizer: str | None,
) -> Plans:
    """Write the plans into ``folder``; ``rounds`` and ``steps`` replace the model's usual ones."""
    plan = deepcopy(_EMBEDDED if model == "embedded" else _SMOLLM2)
    plan["seed"] = seed
    plan["model"]["name"] = model
    plan["rounds"] = rounds or plan["rounds"]
    plan["train"]["steps"] = steps or plan["train"]["steps"]
    if fields:
        plan["data"]["fields"] = dict(fields)
    if normalizer:
        plan["evaluate"]["normalizer"] = normalizer
    folder.mkdir(parents=True, exist_ok=True)

    def variant(name: str, sites: list[str], every: int, times: int = 1) -> Path:
        path = folder / f"{name}.yaml"
        content = {"name": name} | plan | {"cohort": {"sites": sites, "quorum": len(sites)}}
        content["train"] = plan["train"] | {"steps": plan["train"]["steps"] * times}
        content["evaluate"] = plan["evaluate"] | {"every": every, "base": every == 1}
        path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
        return path

    return Plans(
        federation=variant("federation", list(SITES), 1),
        alone={site: variant(f"{site}-alone", [site], plan["rounds"]) for site in SITES},
        pooled=variant("pooled", [POOLED], plan["rounds"], times=len(SITES)),
    )
