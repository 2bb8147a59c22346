"""A site's worker, carrying out orders in this process by the real engine on the tiny model."""

from pathlib import Path
from typing import Any

import torch

from fsllm_client.trainer.group import Group
from fsllm_client.trainer.orders import Advanced, Build, Evaluate, Finished, Prepare, Train
from fsllm_client.trainer.session import Session
from fsllm_client.trainer.tensor_files import read_tensors, write_tensors
from fsllm_common.algorithms import algorithm_class
from fsllm_common.plan import Plan

Tensors = dict[str, torch.Tensor]


def make_plan(kind: str = "lora", stage: int = 2, **sections: dict[str, Any]) -> Plan:
    train = {"steps": 2, "batch_size": 6, "micro_batch_size": 3, "precision": "fp32", "learning_rate": 0.01}
    return Plan.model_validate(
        {
            "name": "t",
            "seed": 11,
            "rounds": 9,
            "model": {"name": "tiny"},
            "adapter": {"kind": kind, "rank": 3, "virtual_tokens": 5, **sections.get("adapter", {})},
            "algorithm": sections.get("algorithm", {}),
            "train": {**train, **sections.get("train", {})},
            "deepspeed": {"zero_stage": stage},
            "data": {"template": "plain", "max_length": 24, "validation_fraction": 0.2, **sections.get("data", {})},
            "evaluate": sections.get("evaluate", {}),
        }
    )


class Site:
    """One worker's life."""

    def __init__(self, folder: Path, plan: Plan, alone: Group, model: Path, rows: Path, **prepare: object) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)
        self.plan = plan
        self.reports: list[Advanced] = []
        self.unwanted = False
        self.session = Session(lambda: alone, self.reports.append, lambda: self.unwanted)
        order = {"run_id": "r", "plan": plan, "model": model, "data": rows, "role": "site", **prepare}
        self.prepared = self.session.carry_out(Prepare(**order))

    def build(self) -> Path:
        self.session.carry_out(Build(adapter=self.folder / "version-0.safetensors"))
        return self.folder / "version-0.safetensors"

    def train(self, base: Path, number: int = 1, *, keep: Path | None = None) -> Tensors:
        delta = self.folder / f"delta-{number}.safetensors"
        delta.unlink(missing_ok=True)
        self.finished = self.session.carry_out(Train(round=number, base=base, delta=delta, resume=keep))
        return read_tensors(delta)

    def evaluate(self, adapter: Path) -> Finished:
        return self.session.carry_out(Evaluate(adapter=adapter))


def same(one: Tensors, other: Tensors, tolerance: float = 0.0) -> bool:
    return one.keys() == other.keys() and all(float((one[name] - other[name]).abs().max()) <= tolerance for name in one)


def extend(base: Path, name: str, plan: Plan, value: float = 0.0) -> None:
    """Put a method's other tensors into version 0."""
    adapter = read_tensors(base)
    extra = algorithm_class(name)(plan).extra({n: tuple(t.shape) for n, t in adapter.items()})  # noqa: S610
    write_tensors(base, {**adapter, **{n: torch.full(array.shape, value) for n, array in extra.items()}})


def added(folder: Path, base: Path, delta: Tensors) -> Path:
    path = folder / "next.safetensors"
    start = read_tensors(base)
    write_tensors(path, {name: start[name] + delta[name] for name in start})
    return path
