"""The robust rules, made and asked."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from fsllm_common.algorithms import Algorithm, Update, algorithm_class
from fsllm_common.plan import plan_from_json

Rows = npt.NDArray[np.float32]
RULES: dict[str, dict[str, Any]] = {
    "median": {},
    "trimmed-mean": {},
    "krum": {},
    "multi-krum": {},
    "bulyan": {},
    "norm-bound": {},
    "geometric-median": {},
    "centred-clipping": {},
}
"""By name: parameters. Of seven updates, all of them withstand one."""

BREAKDOWN: list[tuple[str, dict[str, Any], int, int]] = [
    ("median", {}, 7, 3),
    ("median", {}, 20, 9),
    ("trimmed-mean", {"trim": 0.43}, 7, 3),
    ("krum", {"byzantine": 2}, 7, 2),
    ("multi-krum", {"byzantine": 2}, 7, 2),
    ("bulyan", {}, 7, 1),
    ("bulyan", {"byzantine": 2}, 11, 2),
    ("norm-bound", {}, 7, 3),
    ("geometric-median", {}, 5, 2),
    ("geometric-median", {}, 7, 3),
    ("geometric-median", {}, 21, 10),
    ("centred-clipping", {}, 7, 3),
    ("centred-clipping", {}, 20, 9),
    ("centred-clipping", {"radius": 2.0}, 7, 1),
    ("fltrust", {}, 7, 3),
]
"""Name, parameters, updates, and how many bad ones of these the rule still withstands."""


def made(name: str, **parameters: Any) -> Algorithm:  # noqa: ANN401
    raw = {
        "name": "p",
        "model": {"name": "m"},
        "adapter": {"kind": "ia3"},
        "cohort": {"quorum": 100},
        "algorithm": {"name": name, "parameters": parameters},
    }
    return algorithm_class(name)(plan_from_json(json.dumps(raw).encode()))


def shares_of(rule: Algorithm, rows: Any, trusted: Sequence[int] = ()) -> list[float]:  # noqa: ANN401
    wide = np.asarray(rows, np.float64)
    # Examples that a rule must not look at.
    updates = [Update(f"s{i}", 10**i, 7, 3, i in trusted) for i in range(len(wide))]
    if not rule.needs_products:
        return rule.weigh(updates)
    return rule.weigh_by_products(updates, wide @ wide.T)


def result(rule: Algorithm, rows: Any, trusted: Sequence[int] = ()) -> Any:  # noqa: ANN401
    """Return what stands for the mean, in float64 where it is a sum."""
    shares = shares_of(rule, rows, trusted)
    if not rule.needs_rows:
        return np.asarray(shares) @ np.asarray(rows, np.float64)
    counted = [i for i, share in enumerate(shares) if share]
    return rule.combine(np.asarray(rows, np.float32)[counted], [shares[i] for i in counted])


def chosen(rule: Algorithm, rows: Any) -> list[int]:  # noqa: ANN401
    shares = shares_of(rule, rows)
    taken = [i for i, share in enumerate(shares) if share]
    assert [shares[i] for i in taken] == [1 / len(taken)] * len(taken)
    return taken
