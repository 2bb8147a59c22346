"""Making a version of a round's updates, part by part: what the reduction does, and verification does again.

Which parts a round changes is the algorithm's word (``part``, ``moving``, ``remade``); the others stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fsllm.v1.tensors_pb2 import Manifest
from fsllm_common.algorithms import ADAPTER, Algorithm
from fsllm_common.algorithms.base_delta import is_entry
from fsllm_common.tensors.manifest import WIRE_TYPES, split_part_name
from fsllm_server.engine import memory
from fsllm_server.engine.events import Part
from fsllm_server.engine.state import Version
from fsllm_server.store.blobs import Blobs, StoredVersion

if TYPE_CHECKING:
    from fsllm_server.reduce.blocks import Source
    from fsllm_server.reduce.fold import Folded
    from fsllm_server.reduce.sink import Sink

# reduce/ is imported in the functions: numpy would be a third of an idle server's memory.


@dataclass(frozen=True, slots=True)
class Made:
    """A version's parts and the server's state after it, as (name, digest)."""

    parts: tuple[Part, ...]
    state: tuple[tuple[str, str], ...] = ()


class Maker:
    """Makes versions of one run.

    Args:
        algorithm: The run's.
        blobs: Where the base version is.
        sink: Where the new one goes: the blobs, or what only takes digests.
        stopped: Asked now and then; True ends it with Stopped.

    """

    def __init__(self, algorithm: Algorithm, blobs: Blobs, sink: Sink, stopped: Callable[[], bool]) -> None:
        self._algorithm = algorithm
        self._blobs = blobs
        self._sink = sink
        self._stopped = stopped
        self._wire = WIRE_TYPES[algorithm.plan.wire.element_type]

    def make(
        self,
        round_: int,
        base: Version | None,
        uploads: Callable[[], Sequence[StoredVersion]],
        tensors: Manifest,
        sources: Sequence[Source],
        shares: Sequence[float],
    ) -> Made:
        """Make the version of a round.

        Args:
            round_: 0, 1, 2, ...
            base: The version that the updates are deltas of; None in round 0, whose one update is the version.
            uploads: Returns the uploads with their manifests; only called for a method that ``needs_layers``.
            tensors: One of those manifests.
            sources: The uploads.
            shares: Of each of them.

        Raises:
            FsllmError: NOT_FINITE, DISK_FULL, STATE_CORRUPT, BLOB_UNKNOWN.
            Stopped: ``stopped`` said so.

        """
        if base is None:
            return self._first(tensors, sources[0])
        if self._algorithm.needs_layers:
            return self._layers(round_, base, uploads(), shares)
        return self._blocks(round_, base, tensors, sources, shares)

    def _first(self, tensors: Manifest, source: Source) -> Made:
        """Cut version 0 into its parts."""
        from fsllm_server.reduce.fold import Step, fold
        from fsllm_server.reduce.layers import cut_first, ranked

        plan = self._algorithm.plan
        step = Step(self._algorithm.apply, 0, {})
        made: dict[str, Part] = {}
        for part in sorted({self._algorithm.part_of(spec.name, spec.role) for spec in tensors.tensors} or {ADAPTER}):
            own, some = self._own(tensors, source, [part])
            if plan.adapter.ranks and ranked(own):
                views = cut_first(part, StoredVersion(tensors, source.payload), own, plan, self._wire, self._sink)
                made |= {name: _part(name, folded) for name, folded in views.items()}
                continue
            made[part] = _part(
                part, fold(own, None, [some], [1.0], step, self._wire, self._sink, stopped=self._stopped)
            )
        return Made(tuple(made[name] for name in sorted(made)))

    def _blocks(
        self, round_: int, base: Version, tensors: Manifest, sources: Sequence[Source], shares: Sequence[float]
    ) -> Made:
        """Fold the updates into each part that moves."""
        from fsllm_server.reduce.fold import Step, fold

        algorithm = self._algorithm
        parts = {part.name: part for part in base.parts}
        state: dict[str, str] = {}
        for name in algorithm.moving(round_):
            kept: dict[str, StoredVersion | float] = {}
            if name == ADAPTER:
                kept = {
                    **algorithm.state(),
                    **{key: self._blobs.get(bytes.fromhex(digest)) for key, digest in base.state if key != memory.NAME},
                }
            combine = algorithm.combine if algorithm.needs_rows else None
            folded = fold(
                (master := self._blobs.get(bytes.fromhex(parts[name].master))).manifest,
                master,
                [self._own(tensors, source, [name])[1] for source in sources],
                shares,
                Step(algorithm.apply, round_, kept, combine, name),
                self._wire,
                self._sink,
                stopped=self._stopped,
            )
            parts[name] = _part(name, folded)
            state |= {key: stored.digest.hex() for key, stored in folded.state.items()}
        if algorithm.remembers():
            state[memory.NAME] = memory.keep(algorithm, self._sink).hex()
        return Made(tuple(parts[name] for name in sorted(parts)), tuple(sorted(state.items())))

    def _own(self, tensors: Manifest, source: Source, parts: Sequence[str]) -> tuple[Manifest, Source]:
        """Return of an upload what belongs to these parts."""
        from fsllm_server.reduce.blocks import Source, segments

        own = [spec for spec in tensors.tensors if self._algorithm.part_of(spec.name, spec.role) in parts]
        if len(own) == len(tensors.tensors):
            return tensors, source
        found = segments(tensors, lambda spec: self._algorithm.part_of(spec.name, spec.role) in parts)
        return Manifest(tensors=own), Source(source.payload, source.element_type, found)

    def _layers(self, round_: int, base: Version, uploads: Sequence[StoredVersion], shares: Sequence[float]) -> Made:
        """Have the algorithm combine the updates module by module."""
        from fsllm_server.reduce.layers import LayerStep, RankedUpdate, TensorFile, fold_layers

        algorithm, plan = self._algorithm, self._algorithm.plan
        # The masters, for what the wire has rounded off a version belongs to the next one: a change that is smaller
        # than that would else be lost in every round. An update is a difference, so it may be added to the master.
        masters: dict[str, dict[int, StoredVersion]] = {}
        for part in base.parts:
            name, rank = split_part_name(part.name)
            masters.setdefault(name, {})[rank or plan.adapter.rank] = self._blobs.get(bytes.fromhex(part.master))
        (moving,) = algorithm.moving(round_)
        views = {rank: TensorFile(stored) for rank, stored in masters[moving].items()}
        updates = []
        for stored, share in zip(uploads, shares, strict=True):
            sent = TensorFile(stored)
            of = next(rank for rank, view in views.items() if view.shapes == sent.shapes)
            updates.append(RankedUpdate(share, of, sent, views[of]))
        ledger = {name: view[plan.adapter.rank] for name, view in masters.items() if is_entry(name)}
        entry = algorithm.base_delta(
            [update.rank for update in updates],
            [int(stored.manifest.tensors[1].shape[0]) for stored in ledger.values()],
        )
        remade = algorithm.remade(round_)
        step = LayerStep(
            algorithm,
            round_,
            [TensorFile(view[max(view)]) for name, view in masters.items() if name not in (*remade, *ledger)],
            [TensorFile(stored) for _, stored in sorted(ledger.items())],
            entry,
            {name: masters[name] for name in remade},
        )
        made = fold_layers(step, updates, self._wire, self._sink, stopped=self._stopped)
        stays = {
            part.name: part for part in base.parts if not (entry is not None and entry.replaces and is_entry(part.name))
        }
        parts = stays | {name: _part(name, folded) for name, folded in made.items()}
        return Made(tuple(parts[name] for name in sorted(parts)))


def _part(name: str, folded: Folded) -> Part:
    return Part(
        name=name,
        digest=folded.published.digest.hex(),
        master=folded.master.digest.hex(),
        payload_bytes=folded.published.manifest.payload_bytes,
    )
