"""Making the next version: apply(base, what stands for the mean delta, state), in float32, block after block.

What stands for the mean is made by a reducer (``sum``, ``rows``) of the updates and their shares, which the algorithm
gives from what the updates say of themselves or from their inner products (``products``). The order of the updates is
the caller's (the engine sorts by member), and nothing depends on when an update arrived: the same set gives the same
bits on every machine, so that anyone who holds the manifest of a commit can verify it. Memory is a few blocks, whatever
the payload and the number of updates.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from itertools import cycle
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol

import numpy as np

from fsllm.v1.tensors_pb2 import ELEMENT_TYPE_FLOAT32, ElementType, Manifest
from fsllm_common.algorithms import ADAPTER, Block
from fsllm_common.errors import FsllmError
from fsllm_common.tensors.arrays import BLOCK, Array, narrow, square_sum
from fsllm_common.tensors.manifest import byte_count, element_count
from fsllm_server.reduce import Stopped
from fsllm_server.reduce.blocks import (
    BlockReader,
    Opened,
    Scratch,
    Source,
    block_reader,
    blocks,
    scratch,
    uniform_type,
)
from fsllm_server.reduce.rows import Combine, CombinedRows
from fsllm_server.reduce.sink import Sink, Writer
from fsllm_server.reduce.sum import WeightedSum
from fsllm_server.store.blobs import StoredVersion

if TYPE_CHECKING:
    import numpy.typing as npt

_LANES: Final = 3
"""Blocks in the making: two are computed while the third is hashed and written. Nobody else needs the processor then:
all sites wait for the version."""

Apply = Callable[[Block], "npt.NDArray[np.float32]"]
"""See algorithms.Algorithm.apply."""


@dataclass(frozen=True, slots=True)
class Folded:
    """The next version, as the server keeps it and as it is published."""

    master: StoredVersion
    """float32."""
    published: StoredVersion
    """In the plan's wire type; the same blob when that is float32."""
    state: Mapping[str, StoredVersion]
    """The server's state after the step, float32, by name."""


@dataclass(frozen=True, slots=True)
class Step:
    """The server's step: an algorithm's, in one round."""

    apply: Apply
    round: int
    state: Mapping[str, StoredVersion | float]
    """As the last round has left it, by name; a number stands for a tensor that is the same everywhere."""
    combine: Combine | None = None
    """What stands for the mean; None: the sum."""
    part: str = ADAPTER
    """Of the version."""


class _Mean(Protocol):
    """What stands for the mean, block by block."""

    def fill(self, start: int, total: Array) -> None: ...

    def close(self) -> None: ...


def fold(
    tensors: Manifest,
    base: StoredVersion | None,
    updates: Sequence[Source],
    shares: Sequence[float],
    step: Step,
    wire: ElementType.ValueType,
    sink: Sink,
    *,
    stopped: Callable[[], bool] = lambda: False,
) -> Folded:
    """Make the next version, or a part of it, and store it.

    Args:
        tensors: Names, shapes and roles: the base's manifest, or of what is read of the one update that is version 0.
        base: The float32 master of the base version; None: the one update is the version itself.
        updates: Deltas of these tensors, in the order to add them.
        shares: Of each update; they may be 0, and need not add up to 1.
        step: What makes the next version of the base, the mean delta and the server's state.
        wire: What the published payload holds.
        sink: Where to: the blobs, or what only takes digests.
        stopped: Asked between blocks.

    Raises:
        FsllmError: NOT_FINITE: the version would hold NaN or Inf in the wire type. DISK_FULL, STATE_CORRUPT.
        Stopped: ``stopped`` said so.

    """
    with ExitStack() as stack:
        lanes = [stack.enter_context(closing(_Lane(base, updates, shares, step, wire, stopped))) for _ in range(_LANES)]
        whole = _typed(tensors, ELEMENT_TYPE_FLOAT32)
        master = stack.enter_context(sink.create(whole))
        published: Writer | None = None
        if wire != ELEMENT_TYPE_FLOAT32:
            published = stack.enter_context(sink.create(_typed(tensors, wire)))
        # Version 0 is nobody's step: the state begins with the first.
        names = step.state if base is not None else ()
        state = {name: stack.enter_context(sink.create(whole)) for name in names}
        for made in _in_order(lanes, tensors):
            master.write(made.version.view(np.uint8).data)
            if published is not None:
                published.write(made.sent.view(np.uint8).data)
            for name, writer in state.items():
                writer.write(made.state[name].view(np.uint8).data)
        kept = master.commit()
        return Folded(
            kept,
            published.commit() if published is not None else kept,
            {name: writer.commit() for name, writer in state.items()},
        )


class _Made(NamedTuple):
    """One block of what a fold makes."""

    version: Array
    sent: npt.NDArray[Any]
    """The same in the wire's type."""
    state: Mapping[str, Array]


class _Lane:
    """Computes one block at a time, in buffers of its own."""

    def __init__(
        self,
        base: StoredVersion | None,
        updates: Sequence[Source],
        shares: Sequence[float],
        step: Step,
        wire: ElementType.ValueType,
        stopped: Callable[[], bool],
    ) -> None:
        self._step = step
        self._count = len(updates)
        self._wire = wire
        self._stopped = stopped
        self._state: dict[str, BlockReader | float] = {}
        self._mean = np.empty(BLOCK, dtype=np.float32)
        buffer = scratch()
        with ExitStack() as opened:
            # Version 0 is the one update.
            first = updates[0] if base is None else Source(base.payload, uniform_type(base.manifest))
            (self._base,) = opened.enter_context(closing(Opened([first], buffer)))
            self._reducer: _Mean | None = None
            if base is not None:
                self._reducer = opened.enter_context(closing(_reducer(updates, shares, step.combine, buffer, stopped)))
                for name, kept in step.state.items():
                    # Each in memory of its own: all of it is looked at together, and changed.
                    self._state[name] = (
                        kept
                        if isinstance(kept, float)
                        else opened.enter_context(block_reader(kept.payload, ELEMENT_TYPE_FLOAT32, once=True))
                    )
            self._files = opened.pop_all()

    def close(self) -> None:
        """Let the files go."""
        self._files.close()

    def make(self, tensors: Manifest, start: int, count: int) -> _Made:
        """Return the block at ``start``; valid until the next call.

        Raises:
            FsllmError: NOT_FINITE, naming the tensor; STATE_CORRUPT.
            Stopped: The fold is to stop.

        """
        if self._stopped():
            raise Stopped
        state: dict[str, Array] = {}
        if self._reducer is None:
            version = self._base.read(start, count)
        else:
            mean = self._mean[:count]
            self._reducer.fill(start, mean)
            base = self._base.read(start, count)  # after it, because they share the buffer
            state = {
                name: np.full(count, kept, np.float32) if isinstance(kept, float) else kept.read(start, count)
                for name, kept in self._state.items()
            }
            block = Block(self._step.round, base, mean, state, self._step.part, self._count)
            version = np.ascontiguousarray(self._step.apply(block), dtype=np.float32)
            state = {name: np.ascontiguousarray(array, dtype=np.float32) for name, array in state.items()}
            for what, array in (("next version", version), *((f"state {name}", kept) for name, kept in state.items())):
                if array.shape != (count,):
                    message = f"the method made {array.shape} of a block of {count} elements, for its {what}"
                    raise FsllmError("INTERNAL", message, cure="Algorithm.apply must work elementwise; report it.")
        sent = narrow(version, self._wire)
        if not math.isfinite(square_sum(sent)):
            raise _not_finite(tensors, start, sent)
        for name, array in state.items():
            if not math.isfinite(square_sum(array)):
                raise FsllmError("NOT_FINITE", f"the server's {name} would hold NaN or Inf")
        return _Made(version, sent, state)


def _reducer(
    updates: Sequence[Source],
    shares: Sequence[float],
    combine: Combine | None,
    buffer: Scratch,
    stopped: Callable[[], bool],
) -> WeightedSum | CombinedRows:
    if combine is None:
        return WeightedSum(updates, shares, buffer, stopped)
    return CombinedRows(updates, shares, combine, buffer, stopped)


def _in_order(lanes: Sequence[_Lane], tensors: Manifest) -> Iterator[_Made]:
    """Yield what the lanes make of all blocks, in order. While one is looked at, the others compute the next ones."""
    with ThreadPoolExecutor(len(lanes) - 1, "fold") as pool:
        coming: deque[Future[_Made]] = deque()
        try:
            elements = sum(map(element_count, tensors.tensors))
            for (start, count), lane in zip(blocks(elements), cycle(lanes), strict=False):
                coming.append(pool.submit(lane.make, tensors, start, count))
                if len(coming) == len(lanes):
                    yield coming.popleft().result()
            while coming:
                yield coming.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def _typed(manifest: Manifest, element_type: ElementType.ValueType) -> Manifest:
    """Return a manifest of the same tensors in another element type, without digest."""
    typed = Manifest()
    typed.tensors.extend(manifest.tensors)
    for spec in typed.tensors:
        spec.element_type = element_type
    typed.payload_bytes = sum(map(byte_count, typed.tensors))
    return typed


def _not_finite(manifest: Manifest, start: int, block: npt.NDArray[np.generic]) -> FsllmError:
    bad = np.flatnonzero(~np.isfinite(block.astype(np.float32)))
    at = start + (int(bad[0]) if len(bad) else 0)
    for spec in manifest.tensors:
        at -= element_count(spec)
        if at < 0:
            return FsllmError("NOT_FINITE", f"tensor {spec.name!r} of the new version would hold NaN or Inf")
    raise IndexError(start)
