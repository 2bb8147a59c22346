"""Performing a Reduce effect: finding the files, weighing the updates, folding them off the loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import TYPE_CHECKING

from fsllm.v1.tensors_pb2 import Manifest
from fsllm_common.algorithms import Algorithm, Update, algorithm_class, package_of
from fsllm_common.errors import FsllmError
from fsllm_common.tensors.manifest import WIDTH
from fsllm_server.engine import memory, state
from fsllm_server.engine.effects import Reduce
from fsllm_server.engine.events import Reduced
from fsllm_server.engine.making import Maker
from fsllm_server.engine.staleness import discounted
from fsllm_server.engine.state import Run, Version
from fsllm_server.reduce import version_of
from fsllm_server.store.blobs import Blobs, StoredVersion
from fsllm_server.store.spools import Spools

if TYPE_CHECKING:
    from fsllm_server.reduce.blocks import Source


@cache
def installed_algorithm(name: str) -> type[Algorithm]:
    """Return the algorithm of this name; looked up once, since reading every package's entry points takes long.

    Raises:
        PlanInvalid: No installed package registers it.

    """
    return algorithm_class(name)


def weigh(
    algorithm: Algorithm,
    base: Version | None,
    updates: Sequence[state.Update],
    sources: Sequence[Source],
    completed: Mapping[str, float],
    stopped: Callable[[], bool],
) -> list[float]:
    """Return each update's share, from all that was sent where the algorithm asks for it. Version 0 is the one update.

    Args:
        algorithm: The run's.
        base: What the updates are deltas of.
        updates: In the order of the members.
        sources: The same, on disk.
        completed: The shares of the updates that the round completes (``Run.completed``), which are these updates' too.
        stopped: Asked now and then; True ends it with Stopped.

    Raises:
        FsllmError: TOO_FEW_UPDATES; STATE_CORRUPT.
        Stopped: ``stopped`` said so.

    """
    if base is None:
        return [1.0]
    if completed:
        kept = [completed.get(update.member, 0.0) for update in updates]
        total = sum(kept) or 1.0  # less than 1 where a site was revoked in between
        return [share / total for share in kept]
    if len(updates) < (least := algorithm.least_updates()):
        message = f"{algorithm.name} needs {least} updates with these parameters; the round has {len(updates)}"
        raise FsllmError("TOO_FEW_UPDATES", message)
    known = [Update(u.member, u.examples, u.tokens, u.steps, u.trusted) for u in updates]
    discount = partial(discounted, algorithm.plan.cohort.buffer, base, updates)
    if not algorithm.needs_products:
        return discount(algorithm.weigh(known))
    from fsllm_server.reduce.products import inner_products

    elements = updates[0].payload_bytes // WIDTH[sources[0].element_type]
    return discount(algorithm.weigh_by_products(known, inner_products(sources, elements, stopped)))


def recorded_uploads(run_id: str, updates: Sequence[state.Update], spools: Spools) -> list[StoredVersion]:
    """Return the uploads with their manifests.

    Raises:
        FsllmError: STATE_CORRUPT: an upload is missing.

    """
    return [spools.recorded(run_id, u.round, u.member, bytes.fromhex(u.digest)) for u in updates]


def open_updates(run_id: str, updates: Sequence[state.Update], spools: Spools) -> tuple[Manifest, list[Source]]:
    """Return the last update's manifest and what to fold. One manifest is in memory at a time.

    Raises:
        FsllmError: STATE_CORRUPT: an upload is missing.

    """
    from fsllm_server.reduce.blocks import Source, uniform_type

    tensors, sources = Manifest(), []
    for update in updates:
        stored = spools.recorded(run_id, update.round, update.member, bytes.fromhex(update.digest))
        tensors = stored.manifest
        sources.append(Source(stored.payload, uniform_type(tensors)))
    return tensors, sources


def reduce_updates(
    run: Run, effect: Reduce, blobs: Blobs, spools: Spools, clock: Callable[[], float], stopped: Callable[[], bool]
) -> Reduced:
    """Make the version that ``effect`` asks for and return the event that says so. Blocks; runs in a thread.

    Raises:
        FsllmError: NOT_FINITE, DISK_FULL, STATE_CORRUPT, BLOB_UNKNOWN, PLAN_INVALID (the algorithm is not installed),
            TOO_FEW_UPDATES.
        Stopped: The server stops.

    """
    algorithm = installed_algorithm(run.plan.algorithm.name)(run.plan)
    tensors, sources = open_updates(run.id, effect.updates, spools)
    memory.recall(algorithm, effect.base, blobs)
    shares = weigh(algorithm, effect.base, effect.updates, sources, run.completed(effect.round), stopped)
    maker = Maker(algorithm, blobs, blobs, stopped)
    uploads = partial(recorded_uploads, run.id, effect.updates, spools)
    made = maker.make(effect.round, effect.base, uploads, tensors, sources, shares)
    reducer = algorithm.reducer() if effect.base is not None else "sum"
    return Reduced(
        at=clock(),
        job=effect.job,
        parts=made.parts,
        weights=tuple(zip((u.member for u in effect.updates), shares, strict=True)),
        state=made.state,
        reducer=reducer,
        package=package_of(algorithm.name),
        reducer_version=version_of(reducer),
    )
