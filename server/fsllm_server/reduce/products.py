"""STATS: the inner products of all updates, the same bits on every machine.

A product of many numbers is as fast as the library for linear algebra makes it, but such a library adds in an order of
its own, which changes with the processor and the release. So nothing that it adds is ever rounded: in each block, each
update's values are written as whole numbers, hi + lo / 2^18, in units of 2^-17 of the block's largest power of two.
Products of those are below 2^34, and sums of up to 2^18 products stay whole numbers below 2^53, which float64 holds
exactly in whatever order they are added. Left out is what is below 2^-35 of a block's largest value, far less than
float32 distinguishes there. Only the blocks' results are rounded, one after the other, in our order.

Two updates that are the same get the same products to the last bit, so that their distance is exactly 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Final

import numpy as np

from fsllm_common.tensors.arrays import Array
from fsllm_server.reduce import Stopped
from fsllm_server.reduce.blocks import Opened, Source, blocks, rows_at_a_time, scratch

if TYPE_CHECKING:
    import numpy.typing as npt

_BITS: Final = 17


def inner_products(
    updates: Sequence[Source], elements: int, stopped: Callable[[], bool] = lambda: False
) -> npt.NDArray[np.float64]:
    """Return (K, K), the updates' inner products over all ``elements``, in float64; symmetric.

    Memory is 16 bytes for each of ``rows_at_a_time`` elements of each update, and five K x K float64.

    Raises:
        FsllmError: STATE_CORRUPT: a payload is shorter, or gone.
        Stopped: ``stopped`` said so.

    """
    count = len(updates)
    length = rows_at_a_time(count)
    total = np.zeros((count, count))
    pieces = np.empty((2, count, length))
    with closing(Opened(updates, scratch(), once=False)) as readers:
        for start, size in blocks(elements, length):
            high, low = pieces[:, :, :size]
            units = np.empty(count)
            for i, reader in enumerate(readers):
                if stopped():
                    raise Stopped
                units[i] = _split(reader.read(start, size), high[i], low[i])
            # Only these three products may add in any order.
            block = high @ high.T
            mixed = high @ low.T
            mixed += mixed.T
            mixed *= 2.0 ** -(_BITS + 1)
            block += mixed
            np.matmul(low, low.T, out=mixed)
            mixed *= 2.0 ** (-2 * (_BITS + 1))
            block += mixed
            block *= units[:, None]
            block *= units[None, :]
            total += block
    return total


def _split(values: Array, high: npt.NDArray[np.float64], low: npt.NDArray[np.float64]) -> float:
    """Write values as whole numbers in two pieces and return the unit: values = unit x (high + low / 2^18)."""
    largest = max(float(values.max(initial=0)), -float(values.min(initial=0)))
    unit = 2.0 ** (math.frexp(largest)[1] - _BITS)
    np.divide(values, unit, out=low, dtype=np.float64)
    np.rint(low, out=high)
    np.subtract(low, high, out=low)
    np.multiply(low, 2.0 ** (_BITS + 1), out=low)
    np.rint(low, out=low)
    return unit
