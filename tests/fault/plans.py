"""Plans and data of the kill loop."""

from collections.abc import Iterator
from typing import Any

from tests.system import runs


def rows(site: int) -> Iterator[dict[str, str]]:
    """Return a site's data: of no use to the noop algorithm, enough for a few steps of another."""
    for at in range(40):
        yield {"prompt": f"{site} plus {at} = ", "completion": str(site + at)}


def noop_plan(names: list[str], rounds: int, mebibytes: float) -> dict[str, Any]:
    """Return the plan of a run that trains nothing: made-up deltas with a closed form."""
    synthetic = {"tensors": 7, "mebibytes": mebibytes}
    return {**_plan(names, rounds), "algorithm": {"name": "noop", "weighting": "uniform", "synthetic": synthetic}}


def train_plan(names: list[str], rounds: int) -> dict[str, Any]:
    """Return the plan of a run that trains the embedded model, a little."""
    return {
        **_plan(names, rounds),
        "model": {"name": "embedded"},
        "adapter": {"rank": 2},
        "algorithm": {"name": "fedavg"},
        "train": {"steps": 6, "batch_size": 4, "precision": "fp32"},
        "data": {"max_length": 64, "template": "brief"},
    }


def _plan(names: list[str], rounds: int) -> dict[str, Any]:
    return runs.noop_plan(*names, name="chaos", seed=5, rounds=rounds)
