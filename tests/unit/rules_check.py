"""What the tests of the client rules share: what the real trainer is told, and the comparison with the loops."""

import json
from pathlib import Path
from typing import Any

import torch
from paper_loops import CASES, RATE, RATES, STEPS, Kept
from plain_site import Site
from rules_site import Tensors

from fsllm_client.trainer.tensor_files import read_tensors
from fsllm_common.algorithms.seeds import digest
from fsllm_common.plan import Plan


def _plan(name: str, **parameters: Any) -> Plan:  # noqa: ANN401
    return Plan.model_validate(
        {
            "name": "t",
            "seed": 11,
            "rounds": 4,
            "model": {"name": "tiny"},
            "adapter": {"rank": 3, "targets": ["q_proj", "down_proj"]},
            "algorithm": {"name": name, "parameters": parameters},
            "cohort": {"sites": ["a", "b"]},
            "train": {
                "steps": STEPS,
                "batch_size": 6,
                "micro_batch_size": 3,
                "precision": "fp32",
                "optimizer": "sgd",
                "learning_rate": RATES.get(name, RATE),
                "max_grad_norm": 0.0,
            },
            "data": {"template": "plain", "max_length": 24, "validation_fraction": 0.2, "packing": False},
            "evaluate": {"metrics": ["loss"], "limit": 2},
        }
    )


def _assert_close(found: Tensors, expected: Tensors, what: str) -> None:
    assert found.keys() == expected.keys(), what
    for name, tensor in found.items():
        torch.testing.assert_close(
            tensor, expected[name], rtol=1e-5, atol=5e-6, msg=lambda m, n=name: f"{what}, {n}: {m}"
        )


PLANS = {case: _plan(name, **parameters) for case, (_, name, parameters) in CASES.items()}


def rules_spec(folder: Path, model: Path, rows: Path, stage: int) -> dict[str, Any]:
    """Return what ``rules_site.train_all`` needs to play two rounds of every case, under a ZeRO stage."""
    settings = folder / "ds.json"
    # DeepSpeed keeps small tensors whole under ZeRO-3, which hides that they are partitioned.
    settings.write_text(json.dumps({"zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0}}))
    return {
        "folder": str(folder),
        "prepare": {"model": str(model), "data": str(rows), "deepspeed_config": str(settings)},
        "plans": {case: plan.model_dump(mode="json") for case, plan in PLANS.items()},
    }


def assert_as_papers(folder: Path, model: Path, rows: Path) -> None:
    """Compare what the trainer has left in the folder with the papers' loops."""
    site = Site(PLANS["ditto"], model, rows)
    for case, (reference, name, _) in CASES.items():
        kept: Kept = {}
        own = folder / case
        for number in (1, 2):
            version = read_tensors(own / f"base-{number}.safetensors")
            adapter = {name: tensor for name, tensor in version.items() if "/" not in name}
            extra = {name: tensor for name, tensor in version.items() if "/" in name}
            expected, personal = reference(site, site.batches(number), adapter, extra, kept)
            _assert_close(read_tensors(own / f"delta-{number}.safetensors"), expected, f"{case}, round {number}")
            assert max(float(tensor.abs().max()) for tensor in expected.values()) > 1e-3
        evaluated = read_tensors(own / "evaluated.safetensors")
        _assert_close(evaluated, personal(adapter), f"{case}, evaluated")
        rebuilt = digest({name: tensor.numpy() for name, tensor in evaluated.items()}).hex()
        assert (own / "model-digest").read_text() == (rebuilt if name in ("fedkseed", "ferret") else "")
