"""The FACTOR reducer: module by module, all sites' factors become the next version's, and what the base weight gains.

In memory at a time: one module's factors of all sites, R (m + n) numbers, R the sum of the ranks, in float64; never a
product m x n unless R is as large. Products and decompositions are numpy's: the same bits with the same numpy on the
same kind of processor, not on all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from fsllm.v1.tensors_pb2 import ELEMENT_TYPE_FLOAT32, ElementType, Manifest, TensorSpec
from fsllm_common.algorithms import Algorithm, BaseDelta
from fsllm_common.algorithms.base_delta import entry_name
from fsllm_common.algorithms.layers import Layer, LayerUpdate, by_module, cut, module_and_key, of_rank, scale
from fsllm_common.errors import FsllmError
from fsllm_common.tensors.arrays import BLOCK, narrow, widen
from fsllm_common.tensors.manifest import WIDTH, describe, element_count, part_name, role_of
from fsllm_server.reduce import Stopped
from fsllm_server.reduce.fold import Folded
from fsllm_server.reduce.sink import Sink, Writer
from fsllm_server.store.blobs import StoredVersion

if TYPE_CHECKING:
    import numpy.typing as npt

    from fsllm_common.plan import Plan

    Wide = npt.NDArray[np.float64]


class TensorFile:
    """A payload whose tensors are read one at a time."""

    def __init__(self, stored: StoredVersion) -> None:
        self._payload = stored.payload
        self._places: dict[str, tuple[TensorSpec, int]] = {}
        at = 0
        for spec in stored.manifest.tensors:
            self._places[spec.name] = spec, at
            at += element_count(spec) * WIDTH[spec.element_type]

    @property
    def names(self) -> list[str]:
        """In the payload's order."""
        return list(self._places)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """By name."""
        return {name: tuple(spec.shape) for name, (spec, _) in self._places.items()}

    def spec(self, name: str) -> TensorSpec:
        """Return a tensor's name, type, shape and role."""
        return self._places[name][0]

    def read(self, name: str) -> Wide:
        """Return a tensor.

        Raises:
            FsllmError: STATE_CORRUPT: the file is shorter than its manifest states, or gone.

        """
        spec, at = self._places[name]
        length = element_count(spec) * WIDTH[spec.element_type]
        try:
            with self._payload.open("rb", buffering=0) as file:
                file.seek(at)
                data = bytearray(length)
                if file.readinto(data) != length:
                    raise FsllmError("STATE_CORRUPT", f"{self._payload} is shorter than its manifest states")
        except FileNotFoundError:
            raise FsllmError("STATE_CORRUPT", f"{self._payload} is missing") from None
        return widen(memoryview(data), spec.element_type).astype(np.float64).reshape(tuple(spec.shape))


@dataclass(frozen=True, slots=True)
class RankedUpdate:
    """An upload, and the master of the version that its site started from, of the site's rank."""

    share: float
    rank: int
    sent: TensorFile
    base: TensorFile


@dataclass(frozen=True, slots=True)
class LayerStep:
    """What makes the next version of all this."""

    algorithm: Algorithm
    round: int
    fixed: Sequence[TensorFile]
    """Parts of the base version that do not move in this round, without the ledger's."""
    ledger: Sequence[TensorFile]
    """The base-delta ledger's entries."""
    entry: BaseDelta | None
    remade: Mapping[str, Mapping[int, StoredVersion]]
    """The parts to make: by name and rank, as they are in the base version's master."""


def fold_layers(
    step: LayerStep,
    updates: Sequence[RankedUpdate],
    wire: ElementType.ValueType,
    sink: Sink,
    *,
    stopped: Callable[[], bool] = lambda: False,
) -> dict[str, Folded]:
    """Make the parts of the next version that the round changes, by their names (fsllm.v1.VersionPart).

    Args:
        step: What makes them.
        updates: In the order of the members.
        wire: What the published payloads hold.
        sink: Where to.
        stopped: Asked between modules.

    Raises:
        FsllmError: NOT_FINITE, DISK_FULL, STATE_CORRUPT.
        Stopped: ``stopped`` said so.

    """
    plan = step.algorithm.plan
    with ExitStack() as stack:
        writers: list[_PartWriter] = []
        for part, views in step.remade.items():
            for rank, before in views.items():
                name = part if len(views) == 1 else part_name(part, rank)
                writers.append(_PartWriter(name, rank, plan, before.manifest, wire, sink, stack))
        if step.entry is not None:
            described = _entry(step, step.entry)
            name = entry_name(step.round)
            writers.append(_PartWriter(name, plan.adapter.rank, plan, described, wire, sink, stack))
        for module, made in _modules(step, updates, stopped):
            for writer in writers:
                writer.write(module, made)
        return {writer.name: writer.commit() for writer in writers}


def ranked(tensors: Manifest) -> bool:
    """Tell whether the shapes of some of these tensors follow from the adapter's rank."""
    return any(of_rank(module_and_key(spec.name)[1], spec.shape, 1) != tuple(spec.shape) for spec in tensors.tensors)


def cut_first(
    part: str, whole: StoredVersion, tensors: Manifest, plan: Plan, wire: ElementType.ValueType, sink: Sink
) -> dict[str, Folded]:
    """Make a part of version 0 for each of the plan's ranks, by their names.

    Args:
        part: Its name.
        whole: Version 0, of the largest rank.
        tensors: Those of the part.
        plan: The run's.
        wire: What the published payloads hold.
        sink: Where to.

    """
    file = TensorFile(whole)
    modules = by_module(spec.name for spec in tensors.tensors)
    made = {}
    for rank in sorted({plan.adapter.rank, *plan.adapter.ranks}):
        with ExitStack() as stack:
            name = part_name(part, rank)
            writer = _PartWriter(name, rank, plan, _of_rank(tensors, rank), wire, sink, stack)
            for module, names in modules.items():
                writer.write(module, {key: file.read(name) for key, name in names.items()})
            made[writer.name] = writer.commit()
    return made


def _of_rank(tensors: Manifest, rank: int) -> Manifest:
    """Return the same tensors as they are in an adapter of another rank."""
    changed = Manifest()
    changed.CopyFrom(tensors)
    for spec in changed.tensors:
        spec.shape[:] = of_rank(module_and_key(spec.name)[1], spec.shape, rank)
    return changed


def _modules(
    step: LayerStep, updates: Sequence[RankedUpdate], stopped: Callable[[], bool]
) -> Iterator[tuple[str, Mapping[str, Wide]]]:
    """Yield each module's next tensors by key, at the plan's rank, in the order of the adapter's names."""
    plan = step.algorithm.plan
    sent = by_module(updates[0].sent.names)
    ledger = [_places([file]) for file in step.ledger]
    for module, places in _places(_whole(step)).items():
        if stopped():
            raise Stopped
        base = _read(places)
        layer = Layer(
            step.round,
            module,
            base,
            scale(plan, plan.adapter.rank),
            [
                LayerUpdate(
                    update.share,
                    update.rank,
                    scale(plan, update.rank),
                    {
                        key: update.base.read(name) + update.sent.read(name)
                        for key, name in sent.get(module, {}).items()
                    },
                )
                for update in updates
            ],
            [_read(entry[module]) for entry in ledger if module in entry],
        )
        made = dict(step.algorithm.combine_layer(layer)) if sent.get(module) else {}
        for key in base:
            if key not in made:
                made[key] = layer.mean(key) if key in sent.get(module, {}) else base[key]
        yield module, made


_Places: TypeAlias = dict[str, tuple[TensorFile, str]]
"""Where a module's tensors are, by key."""


def _places(files: Sequence[TensorFile]) -> dict[str, _Places]:
    """Return where each module's tensors are; the order is that of the files' names."""
    found: dict[str, _Places] = {}
    for file in files:
        for module, names in by_module(file.names).items():
            found.setdefault(module, {}).update({key: (file, name) for key, name in names.items()})
    return found


def _read(places: _Places) -> dict[str, Wide]:
    return {key: file.read(name) for key, (file, name) in places.items()}


def _whole(step: LayerStep) -> list[TensorFile]:
    """Return the base version without its ledger, at the plan's rank; what is made anew first, as it sets the order."""
    return [TensorFile(views[max(views)]) for views in step.remade.values()] + list(step.fixed)


def _entry(step: LayerStep, entry: BaseDelta) -> Manifest:
    """Return the tensors of the ledger's new entry: U (m, R) and V (R, n) for every module that has A and B."""
    found = []
    for module, places in _places(_whole(step)).items():
        if {"A", "B"} <= places.keys():
            specs = {key: file.spec(name) for key, (file, name) in places.items()}
            prefix = f"{entry_name(step.round)}/{module}"
            found.append((f"{prefix}.lora_U", (specs["B"].shape[0], entry.rank)))
            found.append((f"{prefix}.lora_V", (entry.rank, specs["A"].shape[1])))
    return describe(((name, shape, role_of(name)) for name, shape in found), ELEMENT_TYPE_FLOAT32)


class _PartWriter:
    """Writes a part, master and published, tensor by tensor in its order."""

    def __init__(
        self,
        name: str,
        rank: int,
        plan: Plan,
        like: Manifest,
        wire: ElementType.ValueType,
        sink: Sink,
        stack: ExitStack,
    ) -> None:
        self.name = name
        self._rank = rank
        self._plan = plan
        self._wire = wire
        self._specs = [(spec.name, tuple(spec.shape), spec.role) for spec in like.tensors]
        self._at = 0
        self._master: Writer = stack.enter_context(sink.create(describe(self._specs, ELEMENT_TYPE_FLOAT32)))
        self._published: Writer | None = None
        if wire != ELEMENT_TYPE_FLOAT32:
            self._published = stack.enter_context(sink.create(describe(self._specs, wire)))

    def write(self, module: str, made: Mapping[str, Wide]) -> None:
        """Append what the part has of a module, whose tensors come at the plan's rank."""
        while self._at < len(self._specs):
            name, shape, _ = self._specs[self._at]
            of, key = module_and_key(name)
            if of != module:
                return
            array = cut(key, made[key], self._rank, self._plan)
            if array.shape != shape:
                raise FsllmError("INTERNAL", f"{name} would have shape {array.shape} instead of {shape}")
            self._append(name, array.astype(np.float32).reshape(-1))
            self._at += 1

    def commit(self) -> Folded:
        """Return the part, now that it is whole."""
        if self._at < len(self._specs):
            raise FsllmError("INTERNAL", f"{self._specs[self._at][0]} was not made")
        master = self._master.commit()
        return Folded(master, self._published.commit() if self._published is not None else master, {})

    def _append(self, name: str, flat: npt.NDArray[np.float32]) -> None:
        for start in range(0, len(flat), BLOCK):
            block = flat[start : start + BLOCK]
            sent = narrow(block, self._wire)
            if not np.isfinite(sent.astype(np.float32)).all():
                raise FsllmError("NOT_FINITE", f"tensor {name!r} of the new version would hold NaN or Inf")
            self._master.write(block.view(np.uint8).data)
            if self._published is not None:
                self._published.write(sent.view(np.uint8).data)
