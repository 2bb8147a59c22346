"""A site's ledger of noised releases, and the epsilon they add up to.

Each release is a Gaussian mechanism on the site's whole clipped delta: sensitivity C under zero-out adjacency (the
site's delta against none), noise deviation z C. A site always takes part (q = 1), so that nothing is gained from
sampling, and Renyi DP has a closed form: one release costs alpha / (2 z^2) at order alpha, and costs add up. Under
replacement adjacency the sensitivity is 2C: read z as z / 2.

The daemon books with an accountant of opacus in its trainer; this module serves where torch is not installed, and as a
check of the other. Sources: Mironov 2017 (arXiv 1702.07476), propositions 1 and 3; the conversion is of Balle et al.
2020 (arXiv 1905.09982), theorem 21, which is the one that opacus uses.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

ORDERS: Final[tuple[float, ...]] = (
    *(1 + x / 10 for x in range(1, 100)),
    *map(float, range(12, 64)),
    128.0,
    256.0,
    512.0,
)
"""Orders alpha that are tried; opacus's own, and some higher ones for very small epsilons."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One release that has left, or is about to leave, the site."""

    run: str
    round: int
    multiplier: float
    """z: the noise's deviation / the clip norm."""
    delta: float
    """The delta at which this run's epsilon is stated."""


def epsilon(entries: Iterable[Entry], delta: float) -> float:
    """Return the epsilon at ``delta`` of all the entries together; 0 without any.

    Raises:
        ValueError: A multiplier or delta out of range.

    """
    return _convert(math.fsum(_cost(entry.multiplier) for entry in entries), delta)


def epsilon_of(multiplier: float, releases: int, delta: float) -> float:
    """Return the epsilon at ``delta`` of so many releases with one multiplier.

    Raises:
        ValueError: A multiplier or delta out of range.

    """
    return _convert(releases * _cost(multiplier), delta)


def releases_within(multiplier: float, delta: float, budget: float) -> int:
    """Return how many releases with one multiplier a budget allows.

    Raises:
        ValueError: A multiplier or delta out of range.

    """
    if epsilon_of(multiplier, 1, delta) > budget:
        return 0
    low, high = 1, 2
    while epsilon_of(multiplier, high, delta) <= budget:
        low, high = high, high * 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if epsilon_of(multiplier, middle, delta) <= budget else (low, middle)
    return low


def _cost(multiplier: float) -> float:
    """Return rho, of which alpha times is the Renyi divergence of one release."""
    if not multiplier > 0:
        raise ValueError(f"a noise multiplier must be positive, not {multiplier}")
    return 1 / (2 * multiplier * multiplier)


def _convert(rho: float, delta: float) -> float:
    """Return min over alpha of alpha rho + log((alpha - 1) / alpha) - (log delta + log alpha) / (alpha - 1)."""
    if not 0 < delta < 1:
        raise ValueError(f"delta must be between 0 and 1, not {delta}")
    if rho == 0:
        return 0.0
    best = min(a * rho + math.log((a - 1) / a) - (math.log(delta) + math.log(a)) / (a - 1) for a in ORDERS)
    return max(0.0, best)
