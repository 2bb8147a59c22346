"""Epsilon in closed form against opacus and against figures that others have published."""

import math
import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fsllm_common.accounting.budget import (
    ORDERS,
    Entry,
    epsilon,
    epsilon_of,
    releases_within,
)


@pytest.mark.slow  # importing opacus
@pytest.mark.parametrize("multiplier", [0.5, 1.0, 2.0, 10.0, 50.0])
@pytest.mark.parametrize("releases", [1, 10, 500])
@pytest.mark.parametrize("delta", [1e-5, 1e-8])
def test_it_is_what_opacus_computes_without_sampling(multiplier: float, releases: int, delta: float) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # opacus's imports, and its advice about the range of orders
        from opacus.accountants.analysis import rdp

        costs = rdp.compute_rdp(q=1.0, noise_multiplier=multiplier, steps=releases, orders=list(ORDERS))
        theirs, _ = rdp.get_privacy_spent(orders=list(ORDERS), rdp=costs, delta=delta)
    assert epsilon_of(multiplier, releases, delta) == pytest.approx(theirs, rel=1e-9, abs=1e-9)


def test_a_hundred_rounds_at_ten_are_about_five() -> None:
    # rho = T / 2z^2 = 0.5. The classic conversion gives 5.3; the tighter one that opacus and we use, less.
    classic = min(0.5 * a + math.log(1e5) / (a - 1) for a in ORDERS)
    assert classic == pytest.approx(5.3, abs=0.05)
    assert 4.0 < epsilon_of(10, 100, 1e-5) < classic


def test_it_never_claims_less_than_the_exact_gaussian_mechanism_needs() -> None:
    """T releases at z equal one at z / sqrt(T), whose exact delta is known (Balle and Wang 2018, theorem 8)."""

    def exact_delta(z: float, eps: float) -> float:
        def phi(x: float) -> float:
            return 0.5 * math.erfc(-x / math.sqrt(2))

        return phi(1 / (2 * z) - eps * z) - math.exp(eps) * phi(-1 / (2 * z) - eps * z)

    for z, releases in ((1.0, 1), (2.0, 10), (10.0, 100), (0.7, 3)):
        claimed = epsilon_of(z, releases, 1e-5)
        assert exact_delta(z / math.sqrt(releases), claimed) <= 1e-5
        # ... and is not wasteful either.
        assert exact_delta(z / math.sqrt(releases), claimed * 0.8) > 1e-5


@given(st.lists(st.floats(0.3, 100), max_size=20), st.floats(1e-10, 1e-2))
def test_entries_add_up_in_any_order(multipliers: list[float], delta: float) -> None:
    entries = [Entry("run", number, z, 1e-5) for number, z in enumerate(multipliers)]
    total = epsilon(entries, delta)
    assert total == epsilon(list(reversed(entries)), delta)
    if entries:
        assert total >= epsilon(entries[:-1], delta)
        rho = sum(1 / (2 * z * z) for z in multipliers)
        assert total == pytest.approx(epsilon_of(1 / math.sqrt(2 * rho), 1, delta), rel=1e-9, abs=1e-12)
    else:
        assert total == 0


@given(st.floats(0.5, 50), st.floats(0.1, 20))
def test_a_budget_allows_just_so_many_releases(multiplier: float, budget: float) -> None:
    allowed = releases_within(multiplier, 1e-5, budget)
    if allowed:
        assert epsilon_of(multiplier, allowed, 1e-5) <= budget
    assert epsilon_of(multiplier, allowed + 1, 1e-5) > budget


@pytest.mark.parametrize(("multiplier", "delta"), [(0.0, 1e-5), (-1.0, 1e-5), (math.nan, 1e-5), (1.0, 0.0), (1.0, 1.0)])
def test_nonsense_is_refused(multiplier: float, delta: float) -> None:
    with pytest.raises(ValueError, match="must be"):
        epsilon_of(multiplier, 1, delta)
