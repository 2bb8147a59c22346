"""A site that trains two rounds of each of several plans: in this process, or as a rank of a group (as a script)."""

import json
import sys
from pathlib import Path
from typing import Any

import torch

from fsllm_client.trainer.group import Group, join
from fsllm_client.trainer.kept import PRIVATE, Kept
from fsllm_client.trainer.orders import Build, Evaluate, Prepare, Train
from fsllm_client.trainer.session import Session
from fsllm_client.trainer.tensor_files import read_tensors, write_tensors
from fsllm_common.algorithms import algorithm_class
from fsllm_common.plan import Plan

Tensors = dict[str, torch.Tensor]


def version_after(number: int, version: Tensors, upload: Tensors) -> Tensors:
    """Return what the others and the server might have made of a site's upload."""
    generator = torch.Generator().manual_seed(number)
    made = {
        name: tensor + 0.5 * upload[name] + 0.02 * torch.randn(tensor.shape, generator=generator)
        if name in upload
        else tensor
        for name, tensor in version.items()
    }
    return {**made, "scalars/updates": torch.full((1,), 2.0)} if "scalars/updates" in made else made


def train_twice(folder: Path, plan: Plan, prepare: dict[str, Path], group: Group) -> None:
    """Leave ``base-1``, ``delta-1``, ``base-2``, ``delta-2``, ``private`` (after round 2), ``evaluated`` and
    ``model-digest`` (of round 2)."""
    session = Session(lambda: group, lambda _: None, bool)
    session.carry_out(Prepare(run_id="r", plan=plan, role="site", **prepare))
    files = {name: folder / f"{name}.safetensors" for name in ("base-1", "delta-1", "base-2", "delta-2", "evaluated")}
    if group.rank == 0:
        folder.mkdir()
        session.carry_out(Build(adapter=files["base-1"]))
        adapter = read_tensors(files["base-1"])
        algorithm = algorithm_class(plan.algorithm.name)(plan)
        shapes = {name: tuple(tensor.shape) for name, tensor in adapter.items()}
        added = algorithm.extra(shapes)  # noqa: S610 (no database)
        generator = torch.Generator().manual_seed(3)
        version = adapter | {name: torch.from_numpy(array) for name, array in added.items()}
        version = {n: t + 0.1 * torch.randn(t.shape, generator=generator) for n, t in version.items()}
        if "scalars/updates" in version:
            version["scalars/updates"] = torch.zeros(1)
        write_tensors(files["base-1"], version)
    group.total(0.0)
    for number in (1, 2):
        base, delta = files[f"base-{number}"], files[f"delta-{number}"]
        done = session.carry_out(Train(round=number, base=base, delta=delta, resume=folder / "private"))
        if group.rank == 0:
            Kept(folder / "private", PRIVATE).acknowledge(number)
        if number == 1 and group.rank == 0:
            write_tensors(files["base-2"], version_after(1, read_tensors(base), read_tensors(delta)))
        group.total(0.0)
    session.carry_out(Evaluate(adapter=files["base-2"], version=2, resume=folder / "private"))
    engine = session._prepared().engine
    adapter = engine.read_adapter()
    if group.rank == 0:
        (folder / "model-digest").write_text(done.model_digest)
        write_tensors(files["evaluated"], adapter)
        write_tensors(folder / "private.safetensors", Kept(folder / "private", PRIVATE).before(3) or {})
    engine.close()


def train_all(spec: dict[str, Any], group: Group) -> None:
    """Train each of ``spec["plans"]`` in a folder of its name under ``spec["folder"]``."""
    prepare = {key: Path(path) for key, path in spec["prepare"].items()}
    for name, plan in spec["plans"].items():
        train_twice(Path(spec["folder"]) / name, Plan.model_validate(plan), prepare, group)


if __name__ == "__main__":
    from os import environ

    train_all(json.loads(Path(sys.argv[1]).read_text()), join(int(environ["RANK"]), int(environ["WORLD_SIZE"])))
