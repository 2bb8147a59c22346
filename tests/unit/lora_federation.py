"""Sites that train LoRA's factors at random, and the server's arithmetic for real: for tests of methods on products."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fsllm.v1.tensors_pb2 import ELEMENT_TYPE_FLOAT32
from fsllm_common.algorithms import Algorithm, Update, algorithm_class
from fsllm_common.algorithms.layers import module_and_key, scale
from fsllm_common.plan import Plan
from fsllm_common.tensors.arrays import decode, encode
from fsllm_common.tensors.manifest import role_of
from fsllm_server.engine.making import Maker
from fsllm_server.engine.state import Version
from fsllm_server.reduce.blocks import Source
from fsllm_server.store.blobs import Blobs, StoredVersion

MODULES = {"model.q_proj": (10, 12), "model.v_proj": (9, 7)}
EXAMPLES = (3, 5, 8)
SHARES = tuple(count / sum(EXAMPLES) for count in EXAMPLES)
"""Of the three sites."""
SAME, DIFFERENT = (4, 4, 4), (4, 2, 1)

Arrays = dict[str, Any]


def make_plan(name: str, **changes: Any) -> Plan:  # noqa: ANN401
    adapter = {"rank": 4, "alpha": 6.0, "ranks": (2, 1), **changes.pop("adapter", {})}
    algorithm = {"name": name, "weighting": "examples", "parameters": changes.pop("parameters", {})}
    return Plan.model_validate(
        {
            "name": "x",
            "model": {"name": "m"},
            "adapter": adapter,
            "algorithm": algorithm,
            "wire": {"element_type": changes.pop("wire", "fp32")},
        }
    )


class Federation:
    """Three sites whose training is a random change of what they may change, and the server's arithmetic."""

    def __init__(self, folder: Path, plan: Plan, ranks: Sequence[int], seed: int = 0) -> None:
        self.folder = folder
        self.plan, self.ranks = plan, ranks
        self.algorithm: Algorithm = algorithm_class(plan.algorithm.name)(plan)
        self.blobs = Blobs(folder / "blobs")
        self.random = np.random.default_rng(seed)
        self.versions: list[Version] = []
        self.sketched: list[dict[str, Arrays]] = []
        self.sent: dict[tuple[int, int], Arrays] = {}
        rank = plan.adapter.rank
        zero: Arrays = {}
        for module, (m, n) in MODULES.items():
            zero[f"{module}.lora_A.weight"] = self.random.normal(size=(rank, n)).astype(np.float32)
            zero[f"{module}.lora_B.weight"] = np.zeros((m, rank), np.float32)
            if plan.adapter.kind == "lora-xs":
                zero[f"{module}.lora_B.weight"] = self.random.normal(size=(m, rank)).astype(np.float32)
                zero[f"{module}.lora_R.weight"] = np.zeros((rank, rank), np.float32)
        zero |= self.algorithm.extra({name: array.shape for name, array in zero.items()})  # noqa: S610 (no Django)
        self._make(0, [self._stored(zero, 0)], [1.0])

    def received(self, rank: int) -> Arrays:
        """Return all tensors that a site of this rank has after fetching the latest version."""
        return {
            name: array
            for part in self.versions[-1].view(rank).parts
            for name, array in self._decoded(self.blobs.get(bytes.fromhex(part.digest))).items()
        }

    def gained(self, rank: int) -> dict[str, Any]:
        """Return what each module's weight is more than the base model's, at a site of this rank."""
        tensors = self.received(rank)
        total: dict[str, Any] = {module: np.zeros(shape) for module, shape in MODULES.items()}
        for module in MODULES:
            total[module] += scale(self.plan, rank) * product(tensors, module)
        for name, array in tensors.items():
            module, key = module_and_key(name)
            if key == "U":
                total[module] += array.astype(np.float64) @ tensors[name.replace("lora_U", "lora_V")].astype(np.float64)
        return total

    def send(self, change: Callable[[int, str, Any], Any]) -> list[Arrays]:
        """Play a round in which each site adds ``change(site, name, received)`` to what moves; return what each has."""
        number, uploads, after = len(self.versions), [], []
        for site, rank in enumerate(self.ranks):
            base = self.received(rank)
            moving = [name for name in base if self.algorithm.part(role_of(name)) in self.algorithm.moving(number)]
            delta = {name: change(site, name, base[name]).astype(np.float32) for name in moving}
            uploads.append(self._stored(delta, site))
            after.append({**base, **{name: base[name] + sent for name, sent in delta.items()}})
        weights = self.algorithm.weigh([Update(str(k), n, n, 1) for k, n in enumerate(EXAMPLES[: len(self.ranks)])])
        self._make(number, uploads, weights)
        return after

    def round(self) -> dict[str, Any]:
        """Play a round; return sum_k p_k s_k B_k A_k of what the sites have trained, on top of what the base gained."""
        exact = {module: np.zeros(shape) for module, shape in MODULES.items()}
        after = self.send(lambda site, name, received: self.random.normal(size=received.shape, scale=0.3))
        for share, rank, mine in zip(SHARES, self.ranks, after, strict=True):
            for module in MODULES:
                exact[module] += share * scale(self.plan, rank) * product(mine, module)
            for name, array in mine.items():
                module, key = module_and_key(name)
                if key == "U":
                    v = mine[name.replace("lora_U", "lora_V")].astype(np.float64)
                    exact[module] += share * array.astype(np.float64) @ v
        return exact

    def ask(self, local: Sequence[Mapping[str, Any]]) -> None:
        """Play FedASK's two rounds for sites that have trained to ``local``, with its own client half."""
        for _ in range(2):
            number, uploads = len(self.versions), []
            for site, (rank, trained) in enumerate(zip(self.ranks, local, strict=True)):
                received = {name: torch.from_numpy(array.copy()) for name, array in self.received(rank).items()}
                base = {name: value for name, value in received.items() if not name.startswith("sketch/")}
                rule = self.algorithm.local_rule(self.plan, self.algorithm.parameters)
                rule.round, rule.private = number, self.sketched[site] if number % 2 == 0 else {}
                rule.receive(base, {name: value for name, value in received.items() if name.startswith("sketch/")})
                turns = rule.turns(base, 1)
                if number % 2:
                    next(turns)
                    with pytest.raises(StopIteration):
                        turns.send({name: torch.from_numpy(array) for name, array in trained.items()})
                    self.sketched.append(rule.private)
                else:
                    with pytest.raises(StopIteration):
                        next(turns)
                sent = {name: value.numpy() for name, value in rule.produce({}).items()}
                self.sent[number, site] = sent
                uploads.append(self._stored(sent, site))
            self._make(number, uploads, self.algorithm.weigh([Update(str(k), n, n, 1) for k, n in enumerate(EXAMPLES)]))

    def _make(self, number: int, uploads: list[StoredVersion], shares: Sequence[float]) -> None:
        maker = Maker(self.algorithm, self.blobs, self.blobs, lambda: False)
        sources = [Source(stored.payload, ELEMENT_TYPE_FLOAT32) for stored in uploads]
        base = self.versions[-1] if self.versions else None
        made = maker.make(number, base, lambda: uploads, uploads[0].manifest, sources, shares)
        self.versions.append(Version(number, made.parts, made.state))

    def _stored(self, arrays: Arrays, site: int) -> StoredVersion:
        path = self.folder / f"{len(self.versions)}-{site}"
        return StoredVersion(encode(arrays, ELEMENT_TYPE_FLOAT32, path), path)

    @staticmethod
    def _decoded(stored: StoredVersion) -> Arrays:
        return dict(decode(stored.manifest, stored.payload))


def product(tensors: Arrays, module: str, rank: int | None = None) -> Any:  # noqa: ANN401
    """Return a module's B A, or B R A where there is an R; of its first ``rank`` ranks only, if so asked."""
    b, a = (tensors[f"{module}.lora_{key}.weight"].astype(np.float64) for key in "BA")
    r = tensors.get(f"{module}.lora_R.weight", np.eye(len(a))).astype(np.float64)
    return b[:, :rank] @ r[:rank, :rank] @ a[:rank]


def error(found: Mapping[str, Any], exact: Mapping[str, Any]) -> float:
    """Return the largest relative error over the modules, in the Frobenius norm."""
    return max(float(np.linalg.norm(found[m] - exact[m]) / np.linalg.norm(exact[m])) for m in exact)
