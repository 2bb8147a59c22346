"""Performing a Reduce effect: finding the files, weighing the updates, folding them off the loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING

from fsllm.v1.tensors_pb2 import Manifest
from fsllm_common.algorithms import Algorithm, Update, algorithm_class
from fsllm_common.tensors.manifest import WIRE_TYPES
from fsllm_server.engine import state
from fsllm_server.engine.effects import Reduce
from fsllm_server.engine.events import Reduced
from fsllm_server.engine.state import Run, Version
from fsllm_server.store.blobs import Blobs
from fsllm_server.store.spools import Spools

if TYPE_CHECKING:
    from fsllm_server.reduce.sum import Addend, Step


@cache
def installed_algorithm(name: str) -> type[Algorithm]:
    """Return the algorithm of this name; looked up once, since reading every package's entry points takes long.

    Raises:
        PlanInvalid: No installed package registers it.

    """
    return algorithm_class(name)


def weigh(algorithm: Algorithm, base: Version | None, updates: Sequence[state.Update]) -> list[float]:
    """Return each update's share in the sum. Version 0 is the one update itself."""
    if base is None:
        return [1.0]
    return algorithm.weigh([Update(u.member, u.examples, u.tokens, u.steps) for u in updates])


def open_updates(
    run_id: str, updates: Sequence[state.Update], shares: Sequence[float], spools: Spools
) -> tuple[Manifest, list[Addend]]:
    """Return the last update's manifest and what to fold. One manifest is in memory at a time.

    Raises:
        FsllmError: STATE_CORRUPT: an upload is missing.

    """
    from fsllm_server.reduce.blocks import uniform_type
    from fsllm_server.reduce.sum import Addend

    tensors, addends = Manifest(), []
    for update, share in zip(updates, shares, strict=True):
        stored = spools.recorded(run_id, update.round, update.member, bytes.fromhex(update.digest))
        tensors = stored.manifest
        addends.append(Addend(stored.payload, uniform_type(tensors), share))
    return tensors, addends


def server_step(algorithm: Algorithm, round_: int, base: Version | None, blobs: Blobs) -> Step:
    """Return the algorithm's step on a base version, with the state that was kept with it.

    Raises:
        FsllmError: BLOB_UNKNOWN.

    """
    from fsllm_server.reduce.sum import Step

    kept = {name: blobs.get(bytes.fromhex(digest)) for name, digest in (base.state if base is not None else ())}
    return Step(algorithm.apply, round_, {**algorithm.state(), **kept})


def reduce_updates(
    run: Run, effect: Reduce, blobs: Blobs, spools: Spools, clock: Callable[[], float], stopped: Callable[[], bool]
) -> Reduced:
    """Make the version that ``effect`` asks for and return the event that says so. Blocks; runs in a thread.

    Raises:
        FsllmError: NOT_FINITE, DISK_FULL, STATE_CORRUPT, BLOB_UNKNOWN, PLAN_INVALID (the algorithm is not installed).
        Stopped: The server stops.

    """
    # Here, because numpy would be a third of an idle server's memory.
    from fsllm_server.reduce.sum import fold

    algorithm = installed_algorithm(run.plan.algorithm.name)(run.plan)
    shares = weigh(algorithm, effect.base, effect.updates)
    base = blobs.get(bytes.fromhex(effect.base.master)) if effect.base is not None else None
    tensors, addends = open_updates(run.id, effect.updates, shares, spools)
    folded = fold(
        base.manifest if base is not None else tensors,
        base,
        addends,
        server_step(algorithm, effect.round, effect.base, blobs),
        WIRE_TYPES[run.plan.wire.element_type],
        blobs,
        stopped=stopped,
    )
    return Reduced(
        at=clock(),
        job=effect.job,
        digest=folded.published.digest.hex(),
        master=folded.master.digest.hex(),
        payload_bytes=folded.published.manifest.payload_bytes,
        weights=tuple(zip((u.member for u in effect.updates), shares, strict=True)),
        state=tuple(sorted((name, stored.digest.hex()) for name, stored in folded.state.items())),
    )
