"""The rules beside Flower's, where its are right.

Its are not where Adam's bias correction is off by one step and v begins with 0 instead of tau^2, and where the mean of
Multi-Krum is weighted by what the sites say they have counted. Bulyan with f below 3 ends with two updates of the same
score: Flower takes the first, we the one with the nearer next neighbour.
"""

import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from robust_rules import chosen, made, result
from test_algorithms_server import plan, play

PYTHON = next(iter(sorted(Path(__file__).parents[2].glob(".bench-peers/flwr-*/bin/python"))), None)

pytestmark = pytest.mark.skipif(PYTHON is None, reason="no Flower: `make bench-peers` installs it beside, on demand")

EXAMPLES = np.array([3, 5, 8, 2, 9, 4, 4, 7, 1])


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the arrays to aggregate, and what Flower makes of them."""
    rng = np.random.default_rng(7)
    rows = rng.normal(size=(9, 50)).astype(np.float32)
    rows[3] *= 8
    given = {
        "rows": rows,
        "examples": EXAMPLES,
        "many": rng.normal(size=(15, 40)).astype(np.float32),
        "base": rng.normal(size=50).astype(np.float32),
        "deltas": (0.1 * rng.normal(size=(4, 3, 50))).astype(np.float32),
    }
    folder = tmp_path_factory.mktemp("flwr")
    np.savez(folder / "in.npz", **given)  # type: ignore[arg-type] # by name
    script = Path(__file__).with_name("flwr_aggregates.py")
    command = [str(PYTHON), str(script), str(folder / "in.npz"), str(folder / "out.npz")]
    subprocess.run(command, check=True, capture_output=True)
    return given, dict(np.load(folder / "out.npz"))


def mean(rows: Any, counts: Any) -> Any:  # noqa: ANN401
    return np.asarray(counts / counts.sum(), np.float64) @ rows


@pytest.mark.parametrize(
    ("name", "theirs", "parameters"),
    [
        ("median", "median", {}),
        ("trimmed-mean", "trimmed", {"trim": 0.25}),
        ("krum", "krum", {"byzantine": 2}),
    ],
)
def test_robust_rules(both: tuple[Any, Any], name: str, theirs: str, parameters: dict[str, Any]) -> None:
    given, found = both
    np.testing.assert_allclose(result(made(name, **parameters), given["rows"]), found[theirs], atol=1e-6)


def test_bulyan(both: tuple[Any, Any]) -> None:
    given, found = both
    np.testing.assert_allclose(result(made("bulyan", byzantine=3), given["many"]), found["bulyan"], atol=1e-6)


def test_multi_krum_chooses_the_same_and_weighs_them_alike(both: tuple[Any, Any]) -> None:
    given, found = both
    taken = chosen(made("multi-krum", byzantine=2, selected=4), given["rows"])
    np.testing.assert_allclose(mean(given["rows"][taken], EXAMPLES[taken]), found["multikrum"], atol=1e-6)


def test_means_and_momentum(both: tuple[Any, Any]) -> None:
    given, found = both
    np.testing.assert_allclose(mean(given["rows"], EXAMPLES), found["fedavg"], atol=1e-6)
    means = [mean(deltas, EXAMPLES[:3]).astype(np.float32) for deltas in given["deltas"]]
    versions = play(plan("fedavgm", 0.7, momentum=0.9), given["base"], means)
    np.testing.assert_allclose(versions, found["fedavgm"], atol=2e-6)
