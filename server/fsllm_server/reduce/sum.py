"""SUM: what stands for the mean is sum_k share_k delta_k, in float32, one update after the other.

Products and sums are separate IEEE operations in the order of the updates, so that everybody gets the same bits. One
block of one update is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from fsllm_common.tensors.arrays import BLOCK, Array
from fsllm_server.reduce import Stopped
from fsllm_server.reduce.blocks import Opened, Scratch, Source


class WeightedSum:
    """The weighted sum of payloads, block by block. Those whose share is 0 are not read: nothing would come of it."""

    def __init__(
        self, updates: Sequence[Source], shares: Sequence[float], buffer: Scratch, stopped: Callable[[], bool]
    ) -> None:
        counted = [(update, share) for update, share in zip(updates, shares, strict=True) if share]
        self._readers = Opened([update for update, _ in counted], buffer)
        self._shares = [np.float32(share) for _, share in counted]
        self._stopped = stopped
        self._product = np.empty(BLOCK, dtype=np.float32)

    def close(self) -> None:
        """Let the files go."""
        self._readers.close()

    def fill(self, start: int, total: Array) -> None:
        """Overwrite ``total`` (elements,) with the sum from element ``start`` on.

        Raises:
            FsllmError: STATE_CORRUPT.
            Stopped: The fold is to stop.

        """
        product = self._product[: len(total)]
        total.fill(0)
        for reader, share in zip(self._readers, self._shares, strict=True):
            if self._stopped():
                raise Stopped
            np.multiply(reader.read(start, len(total)), share, out=product)
            np.add(total, product, out=total)
