"""BLOCK: what stands for the mean is made of all updates' values of a block at once, as the algorithm combines them.

What it makes works element by element, so that it does not matter where a block begins: with more updates the blocks
are shorter, and memory stays the same (see ``blocks.rows_at_a_time``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np

from fsllm_common.tensors.arrays import Array
from fsllm_server.reduce import Stopped
from fsllm_server.reduce.blocks import Opened, Scratch, Source, blocks, rows_at_a_time

Combine: TypeAlias = Callable[[Array, Sequence[float]], Array]
"""See algorithms.Algorithm.combine."""


class CombinedRows:
    """What ``combine`` makes of payloads, block by block. Those whose share is 0 are left out."""

    def __init__(
        self,
        updates: Sequence[Source],
        shares: Sequence[float],
        combine: Combine,
        buffer: Scratch,
        stopped: Callable[[], bool],
    ) -> None:
        counted = [(update, share) for update, share in zip(updates, shares, strict=True) if share]
        self._readers = Opened([update for update, _ in counted], buffer)
        self._shares = [share for _, share in counted]
        self._combine = combine
        self._stopped = stopped
        self._rows = np.empty((len(counted), rows_at_a_time(len(counted))), dtype=np.float32)

    def close(self) -> None:
        """Let the files go."""
        self._readers.close()

    def fill(self, start: int, total: Array) -> None:
        """Overwrite ``total`` (elements,) with what is made of the elements from ``start`` on.

        Raises:
            FsllmError: STATE_CORRUPT.
            Stopped: The fold is to stop.

        """
        if not self._shares:
            total.fill(0)
            return
        for at, count in blocks(len(total), self._rows.shape[1]):
            rows = self._rows[:, :count]
            for row, reader in zip(rows, self._readers, strict=True):
                if self._stopped():
                    raise Stopped
                row[:] = reader.read(start + at, count)
            # -0 becomes 0: the two are equal, and which of them a sort puts first depends on the processor.
            rows += np.float32(0)
            total[at : at + count] = self._combine(rows, self._shares)
