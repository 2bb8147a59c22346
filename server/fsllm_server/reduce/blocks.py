"""Reading payloads block by block into one buffer: memory does not grow with the payload or the number of payloads.

pread into a buffer rather than mmap: mapped pages count as the server's memory, and a truncated file would kill it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from fsllm.v1.tensors_pb2 import ELEMENT_TYPE_FLOAT32, ElementType, Manifest
from fsllm_common.errors import FsllmError
from fsllm_common.tensors.arrays import BLOCK, Array, widen
from fsllm_common.tensors.manifest import WIDTH

if TYPE_CHECKING:
    import numpy.typing as npt

Scratch: TypeAlias = "npt.NDArray[np.uint8]"


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
    """A payload as one flat array of float32, read ``BLOCK`` elements at a time."""

    def __init__(self, path: Path, element_type: ElementType.ValueType, buffer: Scratch, *, once: bool = False) -> None:
        """Open nothing yet.

        Args:
            path: Of the payload.
            element_type: Of all its elements.
            buffer: See ``scratch``.
            once: Nobody will soon want what was read: the page cache lets go of it. The version that is written
                meanwhile takes these pages over, which costs far less than pages that nobody had before.

        """
        self.path = path
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

        """
        width = WIDTH[self._type]
        view = self._buffer.data[: count * width]
        if self._file >= 0:
            self._fill(self._file, view, start * width)
        else:
            file = self._opened()
            try:
                # A file that was just opened is read ahead a little at a time; this asks for the block at once.
                os.posix_fadvise(file, start * width, len(view), os.POSIX_FADV_WILLNEED)
                self._fill(file, view, start * width)
            finally:
                os.close(file)
        self.last = view
        return widen(view, self._type)

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


def blocks(elements: int) -> Iterator[tuple[int, int]]:
    """Yield (start, count) of each block of ``elements``."""
    for start in range(0, elements, BLOCK):
        yield start, min(BLOCK, elements - start)
