"""Performing a Reduce effect: finding the files, weighing the updates, folding them off the loop."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

from fsllm_common.algorithms import Algorithm, Update, algorithm_class
from fsllm_common.tensors.manifest import WIRE_TYPES
from fsllm_server.engine.effects import Reduce
from fsllm_server.engine.events import Reduced
from fsllm_server.engine.state import Run
from fsllm_server.store.blobs import Blobs
from fsllm_server.store.spools import Spools


@cache
def installed_algorithm(name: str) -> type[Algorithm]:
    """Return the algorithm of this name; looked up once, since reading every package's entry points takes long.

    Raises:
        PlanInvalid: No installed package registers it.

    """
    return algorithm_class(name)


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
    files = [
        spools.recorded(run.id, effect.round, update.member, bytes.fromhex(update.digest)) for update in effect.updates
    ]
    shares = [1.0]
    if effect.base is not None:
        shares = algorithm.weigh([Update(u.member, u.examples, u.tokens, u.steps) for u in effect.updates])
    folded = fold(
        blobs.get(bytes.fromhex(effect.base.master)) if effect.base is not None else None,
        list(zip(files, shares, strict=True)),
        algorithm.apply,
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
    )
