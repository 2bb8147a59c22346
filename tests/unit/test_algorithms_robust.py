"""The robust rules against definitions written here from the papers, and against what they promise."""

import itertools
import math
import statistics
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from robust_rules import BREAKDOWN, RULES, chosen, made, result, shares_of

from fsllm_common.algorithms import Update, algorithm_class, algorithm_names, geometry
from fsllm_common.algorithms.robust import Robust
from fsllm_common.errors import FsllmError

# Coordinate by coordinate.


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_the_median_of_everything_small(count: int) -> None:
    columns = list(itertools.product([-2.0, -0.5, 0.0, 3.0], repeat=count))
    got = made("median").combine(np.array(columns, np.float32).T.copy(), [1 / count] * count)
    assert got.tolist() == [statistics.median(column) for column in columns]


@pytest.mark.parametrize(("count", "trim", "drop"), [(3, 0.4, 1), (4, 0.25, 1), (5, 0.2, 1), (5, 0.4, 2), (6, 0.45, 2)])
def test_the_trimmed_mean_of_everything_small(count: int, trim: float, drop: int) -> None:
    columns = list(itertools.product([-2.0, 0.0, 1.0, 3.0], repeat=count))
    got = made("trimmed-mean", trim=trim).combine(np.array(columns, np.float32).T.copy(), [1 / count] * count)
    wanted = [statistics.mean(sorted(column)[drop : count - drop]) for column in columns]
    np.testing.assert_allclose(got, wanted, rtol=1e-6, atol=1e-7)


def test_trim_means_what_was_written() -> None:
    """0.29 x 100 is 28.999... in floating point; 29 are to be dropped."""
    rows = np.arange(100, dtype=np.float32)[:, None] ** 3
    (got,) = made("trimmed-mean", trim=0.29).combine(rows.copy(), [0.01] * 100)
    assert got == pytest.approx(float(np.mean(rows[29:71].astype(np.float64))))
    assert made("trimmed-mean", trim=0.29).least_updates() == 4
    assert made("trimmed-mean", trim=0.2).least_updates() == 5
    assert made("trimmed-mean", trim=0.01).least_updates() == 100


# Krum and Bulyan, by definition in rational numbers; of equal scores the one with the nearer next neighbours.


def scores_by_definition(rows: Sequence[Sequence[int]], f: int, least: int = 0) -> list[list[Fraction]]:
    out = []
    for i, one in enumerate(rows):
        others = (row for j, row in enumerate(rows) if j != i)
        far = sorted(Fraction(sum((a - b) ** 2 for a, b in zip(one, other, strict=True))) for other in others)
        neighbours = max(least, len(rows) - f - 2)
        out.append([sum(far[:neighbours], Fraction(0)), *far[neighbours:]])
    return out


def first_of_least(scores: Sequence[list[Fraction]]) -> int:
    return min(range(len(scores)), key=lambda i: (scores[i], i))


def bulyan_selects(rows: Sequence[Sequence[int]], f: int) -> list[int]:
    left = list(range(len(rows)))
    out = []
    while len(out) < len(rows) - 2 * f:
        best = first_of_least(scores_by_definition([rows[i] for i in left], f, least=1))
        out.append(left.pop(best))
    return sorted(out)


def around_the_median(values: Sequence[float], count: int) -> float:
    center = statistics.median(values)
    return statistics.mean(sorted(values, key=lambda v: (abs(v - center), v))[:count])


def test_krum_of_everything_small() -> None:
    krum = made("krum", byzantine=1)
    for values in itertools.product([-3, 0, 1, 5], repeat=5):
        rows = [[value] for value in values]
        assert chosen(krum, rows) == [first_of_least(scores_by_definition(rows, 1))]


def integers(seed: int, count: int, width: int = 3, up_to: int = 50) -> list[list[int]]:
    return np.random.default_rng(seed).integers(-up_to, up_to, (count, width)).tolist()  # type: ignore[no-any-return]


@pytest.mark.parametrize("seed", range(30))
def test_multi_krum_takes_the_best_scores(seed: int) -> None:
    rows = integers(seed, 9)
    scores = scores_by_definition(rows, 2)
    ranked = sorted(range(9), key=lambda i: (scores[i], i))
    assert chosen(made("multi-krum", byzantine=2), rows) == sorted(ranked[:5])  # K - f - 2
    assert chosen(made("multi-krum", byzantine=2, selected=7), rows) == sorted(ranked[:7])
    assert chosen(made("multi-krum", byzantine=2, selected=1), rows) == chosen(made("krum", byzantine=2), rows)


def test_bulyan_of_everything_small() -> None:
    bulyan = made("bulyan", byzantine=1)
    for values in itertools.product([0, 1, 4], repeat=7):
        rows = [[value] for value in values]
        taken = bulyan_selects(rows, 1)
        assert chosen(bulyan, rows) == taken
        (got,) = result(bulyan, rows)
        assert got == pytest.approx(around_the_median([values[i] for i in taken], 3))


@pytest.mark.parametrize("f", [0, 1, 2, 3])
@pytest.mark.parametrize("seed", range(10))
def test_bulyan(seed: int, f: int) -> None:
    rows = integers(seed, 4 * f + 3 + seed % 4)
    taken = bulyan_selects(rows, f)
    assert chosen(made("bulyan", byzantine=f), rows) == taken
    wanted = [around_the_median([rows[i][c] for i in taken], len(taken) - 2 * f) for c in range(3)]
    np.testing.assert_allclose(result(made("bulyan", byzantine=f), rows), wanted, rtol=1e-5)


def test_distances_are_those_of_whole_vectors() -> None:
    """Not sums of the tensors' own norms without their squares, as in FederatedScope: they choose another update."""
    tensors = (slice(0, 2), slice(2, 4))
    differs = 0
    for seed in range(200):
        rows = integers(seed, 5, 4, 9)
        wide = np.array(rows, np.float64)
        defective = []
        for i in range(5):
            far = sorted(
                sum(float(np.linalg.norm(wide[i, part] - wide[j, part])) for part in tensors)
                for j in range(5)
                if j != i
            )
            defective.append(sum(far[:2]))
        right = first_of_least(scores_by_definition(rows, 1))
        assert chosen(made("krum", byzantine=1), rows) == [right]
        differs += right != int(np.argmin(defective))
    assert differs > 10


def test_bulyan_asks_krum_again_after_each_choice() -> None:
    """Not once for all, as Flower and FederatedScope do: they select other updates."""
    differs = 0
    for seed in range(100):
        rows = integers(seed, 11, 2, 9)
        scores = scores_by_definition(rows, 2)
        once = sorted(sorted(range(11), key=lambda i: (scores[i], i))[:7])
        again = bulyan_selects(rows, 2)
        assert chosen(made("bulyan", byzantine=2), rows) == again
        differs += once != again
    assert differs > 10


def test_bulyan_keeps_what_is_near_the_median_and_does_not_trim_both_sides() -> None:
    """As FederatedScope does: of 0, 10, 11, 12, 13 with f = 1 it would keep 10, 11, 12."""
    bulyan = made("bulyan", byzantine=1)
    column = np.array([[0], [10], [11], [11.5], [11.75]], np.float32)
    (got,) = bulyan.combine(column[[3, 1, 4, 0, 2]].copy(), [0.2] * 5)
    assert got == pytest.approx((11 + 11.5 + 11.75) / 3)


# Those that are sums.


@pytest.mark.parametrize("seed", range(8))
def test_the_geometric_median_has_no_slope(seed: int) -> None:
    """At the minimum of sum |v - x_k| the unit vectors to all updates add up to nothing; and scipy finds no better."""
    from scipy.optimize import minimize

    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((5 + seed, 4)) * 10.0 ** rng.integers(-2, 3)
    got = result(made("geometric-median", iterations=3000), rows)
    away = got - rows
    units = away / np.linalg.norm(away, axis=1)[:, None]
    assert np.linalg.norm(units.sum(axis=0)) < 1e-4
    best = minimize(lambda v: np.linalg.norm(v - rows, axis=1).sum(), rows.mean(axis=0), tol=1e-12)
    assert np.linalg.norm(away, axis=1).sum() <= best.fun * (1 + 1e-9)


def test_the_geometric_median_on_an_update() -> None:
    """Where more than half are the same it is they, although its distance to them is 0."""
    rows = [[1.0, 2.0]] * 4 + [[50.0, 0.0], [0.0, -70.0], [9.0, 9.0]]
    np.testing.assert_allclose(result(made("geometric-median"), rows), [1, 2], atol=1e-5)


def test_the_geometric_medians_first_step_is_weiszfelds() -> None:
    rows = np.random.default_rng(0).standard_normal((6, 3))
    weights = 1 / np.linalg.norm(rows - rows.mean(axis=0), axis=1)
    wanted = (weights[:, None] * rows).sum(axis=0) / weights.sum()
    np.testing.assert_allclose(result(made("geometric-median", iterations=1), rows), wanted)
    far = result(made("geometric-median", iterations=5, smoothing=1e6), rows)
    np.testing.assert_allclose(far, rows.mean(axis=0))


@pytest.mark.parametrize("times", [50.0, 1e3, 1e9])
def test_an_honest_update_that_is_far_away_pulls_as_it_always_did(times: float) -> None:
    """Cut to 100 times the median norm it points the same way: the minimum stays where scipy finds it, uncut."""
    from scipy.optimize import minimize

    rows = np.random.default_rng(1).standard_normal((7, 4)) + 1
    rows[3] *= times
    start = np.delete(rows, 3, axis=0).mean(axis=0)
    best = minimize(lambda v: np.linalg.norm(v - rows, axis=1).sum(), start, method="Nelder-Mead", tol=1e-10)
    got = result(made("geometric-median", iterations=3000), rows)
    assert np.linalg.norm(got - best.x) < (1e-4 if times < 100 else 0.01) * np.linalg.norm(best.x)


@pytest.mark.parametrize("name", ["geometric-median", "centred-clipping"])
def test_updates_are_cut_beyond_a_hundred_times_the_median_norm_and_else_not_by_a_bit(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = np.random.default_rng(2).standard_normal((7, 4))
    rows /= np.linalg.norm(rows, axis=1)[:, None]
    near, cut, beyond = (rows * np.array([1, 1, 1, far, 1, 1, 1])[:, None] for far in (99.0, 100.0, 1e5))
    rule = made(name)
    shares = [shares_of(rule, some) for some in (near, cut, beyond)]
    np.testing.assert_allclose(np.array(shares[2]) @ beyond, np.array(shares[1]) @ cut, rtol=1e-9)
    assert shares[2][3] == pytest.approx(shares[1][3] / 1e3)
    monkeypatch.setattr(geometry, "FAR", 1e300)
    assert shares_of(rule, near) == shares[0]
    assert shares_of(rule, beyond) != shares[2]


def test_a_radius_is_no_norm_to_cut_at() -> None:
    """Where the plan's own tau is longer than all, every update counts in full, however far it is from the others."""
    rows = [[1e-3], [1e-3], [2e-3], [10.0]]
    got = result(made("centred-clipping", radius=20.0), rows)
    np.testing.assert_allclose(got, np.mean(rows), rtol=1e-9)


@pytest.mark.parametrize("radius", [0.3, 2.0, "median"])
@pytest.mark.parametrize("iterations", [1, 2, 7])
def test_centred_clipping_is_the_papers_iteration(radius: Any, iterations: int) -> None:  # noqa: ANN401
    rows = np.random.default_rng(3).standard_normal((6, 4)) * 2
    v = np.zeros(4)
    for _ in range(iterations):
        away = np.linalg.norm(rows - v, axis=1)
        tau = np.median(away) if radius == "median" else radius
        v = v + np.mean([(row - v) * min(1, tau / far) for row, far in zip(rows, away, strict=True)], axis=0)
    got = result(made("centred-clipping", radius=radius, iterations=iterations), rows)
    np.testing.assert_allclose(got, v, rtol=1e-9, atol=1e-12)


def test_norms_are_bounded() -> None:
    rows = np.array([[3.0, 4.0], [0.0, 1.0], [0.0, 0.0], [300.0, 400.0]])
    fixed = (np.array([0.6, 0.8]) * 2 + [0, 1] + [1.2, 1.6]) / 4
    np.testing.assert_allclose(result(made("norm-bound", bound=2), rows), fixed)
    # The norms are 5, 1, 0, 500: their median is 3.
    median = (np.array([0.6, 0.8]) * 3 + [0, 1] + [1.8, 2.4]) / 4
    np.testing.assert_allclose(result(made("norm-bound"), rows), median)
    assert shares_of(made("norm-bound", bound=1e6), rows) == [0.25] * 4


@pytest.mark.parametrize("first", [0.1, 0.9, 1.1, 10.0])
def test_the_running_bound_finds_the_median_norm_from_wherever_it_begins(first: float) -> None:
    """Norms around 1, but other ones in the first rounds: a bound that moves the wrong way is lost for ever."""
    rule, random = made("norm-bound", bound="running-median"), np.random.default_rng(0)
    for round_ in range(60):
        norms = np.exp(random.standard_normal(30)) * (first if round_ < 5 else 1.0)
        shares = shares_of(rule, norms[:, None])
    kept = [share * 30 * norm for share, norm in zip(shares, norms, strict=True)]
    assert max(kept) == pytest.approx(1.0, rel=0.08)
    assert min(share * 30 for share in shares) < 0.5
    assert sum(share * 30 == 1 for share in shares) > 8


def test_fltrust_by_its_formula() -> None:
    rows = np.array([[1.0, 1.0], [2.0, 0.0], [0.0, 5.0], [-3.0, -1.0], [0.0, 0.0]])
    root = rows[0]
    total, norm0 = np.zeros(2), math.sqrt(2)
    trust = 0.0
    for row in rows[1:4]:
        score = max(0.0, float(row @ root) / (np.linalg.norm(row) * norm0))
        total += score * norm0 / np.linalg.norm(row) * row
        trust += score
    shares = shares_of(made("fltrust"), rows, trusted=[0])
    assert shares[0] == shares[3] == shares[4] == 0.0
    np.testing.assert_allclose(result(made("fltrust"), rows, trusted=[0]), total / trust)
    # Of two trusted ones, their mean.
    twice = [[4.0, 0.0], *rows[1:].tolist(), [-2.0, 2.0]]
    np.testing.assert_allclose(result(made("fltrust"), twice, trusted=[0, 5]), total / trust)
    # Nobody goes its way: nothing changes. Without it: an error that says so.
    assert shares_of(made("fltrust"), [[1.0], [-1.0], [-5.0]], trusted=[0]) == [0.0] * 3
    with pytest.raises(FsllmError, match="an evaluator's") as error:
        shares_of(made("fltrust"), rows)
    assert error.value.reason == "TOO_FEW_UPDATES"


# What all of them promise.

spread = st.lists(
    st.lists(st.integers(-100, 100).map(lambda x: x / 16), min_size=3, max_size=3), min_size=7, max_size=7
)


@pytest.mark.parametrize("name", RULES)
@settings(max_examples=40, deadline=None)
@given(rows=spread, order=st.permutations(range(7)), noise=st.integers(0, 1000))
def test_the_order_does_not_matter(name: str, rows: list[list[float]], order: list[int], noise: int) -> None:
    # Without ties, which only the order can break.
    values = np.array(rows) + np.random.default_rng(noise).standard_normal((7, 3)) * 0.1
    rule = made(name, **RULES[name])
    np.testing.assert_allclose(result(rule, values[order]), result(rule, values), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [*RULES, "fltrust"])
@given(row=st.lists(st.floats(-1e3, 1e3, width=32), min_size=2, max_size=4))
def test_the_same_update_from_all_is_the_result(name: str, row: list[float]) -> None:
    got = result(made(name, **RULES.get(name, {})), [row] * 7, trusted=[0])
    np.testing.assert_allclose(got, row, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("name", "parameters", "count", "bad"), BREAKDOWN)
@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    size=st.one_of(st.floats(-3, 38).map(lambda e: 10**e), st.just(3.4e38)),
    like=st.sampled_from(["anywhere", "apart", "against", "along"]),
)
def test_as_many_bad_updates_as_it_withstands_move_the_result_only_so_far(
    name: str, parameters: dict[str, Any], count: int, bad: int, seed: int, size: float, like: str
) -> None:
    """However large they are, up to float32's largest: within three radii of the good ones' center."""
    rng = np.random.default_rng(seed)
    center = rng.standard_normal(5)
    rows = center + 0.3 * rng.standard_normal((count, 5))
    trusted = [0] if name == "fltrust" else []
    at = rng.choice(np.arange(len(trusted), count), bad, replace=False)
    good = np.delete(rows, at, axis=0)
    away = {
        "anywhere": rng.standard_normal(5),
        "apart": rng.standard_normal((bad, 5)),
        "against": -center,
        "along": center,
    }[like]
    rows[at] = size * away / np.abs(away).max()
    moved = np.linalg.norm(result(made(name, **parameters), rows.astype(np.float32), trusted) - good.mean(axis=0))
    radius = max(np.linalg.norm(good - good.mean(axis=0), axis=1).max(), np.linalg.norm(good, axis=1).max() / 3)
    assert moved <= 3 * radius


@pytest.mark.parametrize("size", [1e-3, 1.0, 3e38])
def test_all_but_the_trusted_one_may_be_bad(size: float) -> None:
    """Fltrust then goes where they go, but no further than the trusted update, and never back."""
    for seed in range(20):
        rows = np.random.default_rng(seed).standard_normal((7, 5)) / 3
        rows[1:] *= size
        got = result(made("fltrust"), rows.astype(np.float32), [0])
        assert np.linalg.norm(got) <= np.linalg.norm(rows[0]) * (1 + 1e-6)
        assert got @ rows[0] >= 0


def test_every_robust_rule_is_told_how_many_it_withstands() -> None:
    rules = {name for name in algorithm_names() if issubclass(algorithm_class(name), Robust)}
    assert rules == {name for name, *_ in BREAKDOWN} == {*RULES, "fltrust"}


def test_the_mean_is_moved_as_far_as_one_likes() -> None:
    rows = np.ones((7, 5))
    rows[2] = -1e12
    shares = made("fedavg").weigh([Update("s", 1, 1, 1)] * 7)
    assert np.linalg.norm(np.asarray(shares) @ rows) > 1e11


@pytest.mark.parametrize("name", RULES)
def test_what_a_site_says_of_itself_does_not_matter(name: str) -> None:
    rule = made(name, **RULES[name])
    rows = np.random.default_rng(0).standard_normal((7, 3))
    products = rows @ rows.T
    for claimed in ([1] * 7, [10**9, *[1] * 6]):
        updates = [Update(f"s{i}", n, n, n) for i, n in enumerate(claimed)]
        shares = rule.weigh_by_products(updates, products) if rule.needs_products else rule.weigh(updates)
        assert shares == shares_of(rule, rows)
