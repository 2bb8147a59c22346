"""Reading payloads block by block into one buffer: memory does not grow with the payload or the number of payloads.

pread into a buffer rather than mmap: mapped pages count as the server's memory, and a truncated file would kill it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fsllm.v1.tensors_pb2 import ELEMENT_TYPE_FLOAT32, ElementType, Manifest
from fsllm_common.errors import FsllmError
from fsllm_common.tensors.arrays import BLOCK, Array, widen
from fsllm_common.tensors.manifest import WIDTH

if TYPE_CHECKING:
    import numpy.typing as npt


def uniform_type(manifest: Manifest) -> ElementType.ValueType:
    """Return the one element type of all tensors (float32 when there are none)."""
    types = {spec.element_type for spec in manifest.tensors} or {ELEMENT_TYPE_FLOAT32}
    if len(types) > 1:
        raise ValueError("a payload's tensors are of one element type")
    return types.pop()


class BlockReader:
    """A payload as one flat array of float32, read ``BLOCK`` elements at a time."""

    def __init__(self, file: int, path: Path, element_type: ElementType.ValueType) -> None:
        self._file = file
        self._path = path
        self._type = element_type
        self._buffer: npt.NDArray[np.uint8] = np.empty(BLOCK * WIDTH[element_type], dtype=np.uint8)
        self.last = memoryview(b"")
        """The bytes behind what ``read`` returned last."""

    def read(self, start: int, count: int) -> Array:
        """Return ``count`` elements from element ``start`` as float32, shape (count,); valid until the next call.

        Raises:
            FsllmError: STATE_CORRUPT: the file is shorter.

        """
        width = WIDTH[self._type]
        view = self._buffer.data[: count * width]
        done = 0
        while done < len(view):
            got = os.preadv(self._file, [view[done:]], start * width + done)
            if got == 0:
                raise FsllmError("STATE_CORRUPT", f"{self._path} is shorter than its manifest states")
            done += got
        self.last = view
        return widen(view, self._type)


@contextmanager
def block_reader(path: Path, element_type: ElementType.ValueType) -> Iterator[BlockReader]:
    """Open a payload."""
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield BlockReader(file, path, element_type)
    finally:
        os.close(file)


def blocks(elements: int) -> Iterator[tuple[int, int]]:
    """Yield (start, count) of each block of ``elements``."""
    for start in range(0, elements, BLOCK):
        yield start, min(BLOCK, elements - start)
