"""Reading payloads block by block into one buffer: memory does not grow with the payload or the number of payloads.

pread into a buffer rather than mmap: mapped pages count as the server's memory, and a truncated file would kill it.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeAlias

import numpy as np

from fsllm.v1.tensors_pb2 import ELEMENT_TYPE_FLOAT32, ElementType, Manifest, TensorSpec
from fsllm_common.errors import FsllmError
from fsllm_common.tensors.arrays import BLOCK, Array, widen
from fsllm_common.tensors.manifest import WIDTH, element_count

if TYPE_CHECKING:
    import numpy.typing as npt

Scratch: TypeAlias = "npt.NDArray[np.uint8]"

Segment: TypeAlias = tuple[int, int]
"""Where some of a payload's elements lie: the first of them, and how many."""


@dataclass(frozen=True, slots=True)
class Source:
    """A verified payload on disk, or some of it. It holds no manifest: that of a large adapter takes space."""

    payload: Path
    element_type: ElementType.ValueType
    segments: tuple[Segment, ...] | None = None
    """Only these, one after the other; None: all of it."""


def segments(manifest: Manifest, wanted: Callable[[TensorSpec], bool]) -> tuple[Segment, ...]:
    """Return where the payload holds the tensors that are wanted, in its order; neighbours as one segment."""
    found: list[Segment] = []
    at = 0
    for spec in manifest.tensors:
        count = element_count(spec)
        if wanted(spec):
            if found and sum(found[-1]) == at:
                found[-1] = found[-1][0], found[-1][1] + count
            else:
                found.append((at, count))
        at += count
    return tuple(found)


def uniform_type(manifest: Manifest) -> ElementType.ValueType:
    """Return the one element type of all tensors (float32 when there are none)."""
    types = {spec.element_type for spec in manifest.tensors} or {ELEMENT_TYPE_FLOAT32}
    if len(types) > 1:
        raise ValueError("a payload's tensors are of one element type")
    return types.pop()


def scratch() -> Scratch:
    """Return a buffer for one block, which any number of readers may share."""
    return np.empty(BLOCK * max(WIDTH.values()), dtype=np.uint8)


class BlockReader:
    """A payload, or some of it, as one flat array of float32, read at most ``BLOCK`` elements at a time."""

    __slots__ = ("_buffer", "_file", "_once", "_segments", "_starts", "_type", "last", "path")  # there may be thousands

    def __init__(
        self,
        path: Path,
        element_type: ElementType.ValueType,
        buffer: Scratch,
        *,
        once: bool = False,
        segments: Sequence[Segment] | None = None,
    ) -> None:
        """Open nothing yet.

        Args:
            path: Of the payload.
            element_type: Of all its elements.
            buffer: See ``scratch``.
            once: Nobody will soon want what was read: the page cache lets go of it. The version that is written
                meanwhile takes these pages over, which costs far less than pages that nobody had before.
            segments: What the array consists of, one after the other; None: the whole payload.

        """
        self.path = path
        self._segments = tuple(segments) if segments is not None else None
        self._starts = _starts(self._segments) if self._segments is not None else ()
        self._once = once
        self._type = element_type
        self._buffer = buffer
        self._file = -1
        self.last = memoryview(b"")
        """The bytes behind what ``read`` returned last."""

    def open(self) -> None:
        """Keep the file open from now on, until ``close``; otherwise each ``read`` opens it."""
        self._file = self._opened()

    def close(self) -> None:
        """Let the file go. May be called twice."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def read(self, start: int, count: int) -> Array:
        """Return ``count`` elements from element ``start`` as float32, shape (count,).

        Valid until the next call on any reader that shares the buffer.

        Raises:
            FsllmError: STATE_CORRUPT: the file is shorter, or gone.
            IndexError: The segments hold fewer elements.

        """
        width = WIDTH[self._type]
        view = self._buffer.data[: count * width]
        if self._file >= 0:
            self._gather(self._file, view, start)
        else:
            file = self._opened()
            try:
                # A file that was just opened is read ahead a little at a time; this asks for the block at once.
                for place, length in self._places(start, count):
                    os.posix_fadvise(file, place * width, length * width, os.POSIX_FADV_WILLNEED)
                self._gather(file, view, start)
            finally:
                os.close(file)
        self.last = view
        return widen(view, self._type)

    def _places(self, start: int, count: int) -> Iterator[Segment]:
        """Yield where in the file these elements lie."""
        if self._segments is None:
            yield start, count
            return
        if start + count > self._starts[-1]:
            raise IndexError(start + count)
        at = bisect_right(self._starts, start) - 1
        while count:
            first, length = self._segments[at]
            skipped = start - self._starts[at]
            taken = min(count, length - skipped)
            if taken:
                yield first + skipped, taken
            start, count, at = start + taken, count - taken, at + 1

    def _gather(self, file: int, view: memoryview, start: int) -> None:
        width = WIDTH[self._type]
        done = 0
        for place, length in self._places(start, len(view) // width):
            self._fill(file, view[done : done + length * width], place * width)
            done += length * width

    def _opened(self) -> int:
        try:
            return os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise FsllmError("STATE_CORRUPT", f"{self.path} is missing") from None

    def _fill(self, file: int, view: memoryview, offset: int) -> None:
        done = 0
        while done < len(view):
            got = os.preadv(file, [view[done:]], offset + done)
            if got == 0:
                raise FsllmError("STATE_CORRUPT", f"{self.path} is shorter than its manifest states")
            done += got
        if self._once:
            os.posix_fadvise(file, offset, len(view), os.POSIX_FADV_DONTNEED)


@lru_cache(maxsize=4)
def _starts(segments: tuple[Segment, ...]) -> tuple[int, ...]:
    """Return where in the array each segment begins, and the array's length. One tuple for all readers."""
    return (0, *accumulate(count for _, count in segments))


OPEN_FILES: Final = 64
"""Up to so many payloads that are read together, their files stay open; beyond, each is opened for each block."""


class Opened:
    """Readers of several payloads that share a buffer, in their order, with their files."""

    def __init__(self, sources: Sequence[Source], buffer: Scratch, *, once: bool = True) -> None:
        self._readers = [
            BlockReader(one.payload, one.element_type, buffer, once=once, segments=one.segments) for one in sources
        ]
        if len(sources) <= OPEN_FILES:
            try:
                for reader in self._readers:
                    reader.open()
            except BaseException:
                self.close()
                raise

    def __iter__(self) -> Iterator[BlockReader]:
        return iter(self._readers)

    def close(self) -> None:
        """Let the files go."""
        for reader in self._readers:
            reader.close()


@contextmanager
def block_reader(
    path: Path, element_type: ElementType.ValueType, buffer: Scratch | None = None, *, once: bool = False
) -> Iterator[BlockReader]:
    """Open a payload, with a buffer of its own unless one is given."""
    reader = BlockReader(path, element_type, buffer if buffer is not None else scratch(), once=once)
    reader.open()
    try:
        yield reader
    finally:
        reader.close()


def blocks(elements: int, size: int | None = None) -> Iterator[tuple[int, int]]:
    """Yield (start, count) of each block of ``elements``, of ``BLOCK`` unless another size is given."""
    size = size or BLOCK
    for start in range(0, elements, size):
        yield start, min(size, elements - start)


def rows_at_a_time(updates: int) -> int:
    """Return how many elements of each update are in memory where all updates are looked at together.

    About 2 M elements in all; at least 1 K of each, because reading fewer would cost more than the memory is worth.
    """
    return min(BLOCK, max(1 << 10, (1 << 21) // max(1, updates)))
