"""Distances between updates, and to points between them, from their inner products alone.

Everybody must get the same bits: sums are ``math.fsum``, which is exact, or one row after the other; never a product of
matrices, whose sums a library orders as it likes, nor ``sum``, which newer Pythons compute otherwise. Imported where it
is used: numpy is a large part of an idle daemon's memory.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

Matrix: TypeAlias = npt.NDArray[np.float64]

FAR: Final = 100.0
"""Times the median norm: longer than that is no update that points are searched between (``reined_in``)."""


def norms(products: Matrix) -> list[float]:
    """Return |x_i| from the inner products."""
    return [math.sqrt(square) for square in products.diagonal().tolist()]


def reined_in(products: Matrix, least: float = 0.0) -> tuple[Matrix, list[float]]:
    """Return the inner products of updates that are cut to ``FAR`` times their median norm, and the factor of each.

    For rules to which an update that is far away matters by its direction alone, as it does to a geometric median and
    to a clip. Uncut, a single one of 1e16 times the others' length leaves nothing of them in float64's differences
    (``distances_from``), and many of 1e11 times are more than a hundred iterations come back from.

    A bad update that was cut is still one of those that may be anything, so a rule withstands as many as before. If
    fewer than half are bad, the median lies between norms of good ones: a good update is cut only if it is ``FAR``
    times as long as other good ones, and from any v no longer than the median it points the same way as before to
    1 / ``FAR``. If nobody is beyond, not a bit changes. Of clipping before a robust rule see Allouah et al. 2024, arXiv
    2405.14432, who cut at one of the round's norms to gain by it; here nothing is to be cut that could be honest.

    Args:
        products: (K, K), of finite float32 updates: their squares are far from float64's largest.
        least: A norm that is never cut.

    """
    lengths = norms(products)
    factors = shrinkage(lengths, max(least, FAR * median(lengths)))
    return products * np.outer(factors, factors), factors


def squared_distances(products: Matrix) -> Matrix:
    """Return (K, K) |x_i - x_j|^2 from the inner products; exactly 0 between two that are the same."""
    squares = products.diagonal()
    distances: Matrix = np.maximum(squares[:, None] + squares[None, :] - 2 * products, 0)
    return distances


def with_origin(products: Matrix) -> Matrix:
    """Return the inner products with those of the zero vector after them."""
    return np.pad(products, (0, 1))


def distances_from(shares: Sequence[float], squared: Matrix) -> list[float]:
    """Return the distances from y = sum_j shares_j x_j to each x_i, given |x_i - x_j|^2. The shares add up to 1.

    |y - x_i|^2 = sum_j s_j d_ij^2 - 1/2 sum_jk s_j s_k d_jk^2, which unlike the same from inner products is exact for
    updates that are close to each other and far from 0.
    """
    each = np.zeros(len(squared))
    for share, row in zip(shares, squared, strict=True):
        each += share * row
    spread = math.fsum(share * value for share, value in zip(shares, each.tolist(), strict=True))
    return [math.sqrt(max(0.0, value - spread / 2)) for value in each.tolist()]


def by_krum(squared: Matrix, neighbours: int) -> list[int]:
    """Return the updates by their Krum scores, the best first.

    A score is the sum of the ``neighbours`` smallest squared distances to others. Of equal scores (with one neighbour
    the two that are closest to each other always have the same) the next neighbours decide, and at last the order.
    """
    others = squared.copy()
    np.fill_diagonal(others, np.inf)
    others.sort(axis=1)
    scores = np.cumsum(others, axis=1)[:, neighbours - 1 :]
    ranked: list[int] = np.lexsort(scores.T[::-1]).tolist()
    return ranked


def median(values: Sequence[float]) -> float:
    """Return the median; of an even number of values the mean of the two in the middle."""
    return float(statistics.median(values))


def shrinkage(lengths: Sequence[float], bound: float) -> list[float]:
    """Return min(1, bound / length) of each."""
    return [1.0 if length <= bound else bound / length for length in lengths]


def only(chosen: Sequence[int], count: int) -> list[float]:
    """Return equal shares for the chosen ones of ``count`` updates, and 0 for the others."""
    taken = set(chosen)
    return [1 / len(taken) if i in taken else 0.0 for i in range(count)]
