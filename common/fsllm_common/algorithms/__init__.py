"""One file an algorithm, its server half and its client half side by side, and the registry that finds them by name."""

from __future__ import annotations

import functools
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING

from fsllm_common.algorithms.interface import Algorithm, Block, LocalRule, Parameters, Update
from fsllm_common.errors import PlanInvalid

if TYPE_CHECKING:
    from fsllm_common.plan import Plan

__all__ = [
    "Algorithm",
    "Block",
    "LocalRule",
    "Parameters",
    "Update",
    "algorithm_class",
    "algorithm_names",
    "local_rule",
]

_GROUP = "fsllm.algorithms"


@functools.cache
def _installed() -> dict[str, EntryPoint]:
    """Return the registered algorithms by name. Kept, because finding them reads every installed package's metadata."""
    return {entry.name: entry for entry in entry_points(group=_GROUP)}


def local_rule(plan: Plan) -> LocalRule:
    """Return a fresh local rule of the plan's algorithm, for one round.

    Raises:
        PlanInvalid: No installed package registers the algorithm.

    """
    algorithm = algorithm_class(plan.algorithm.name)(plan)
    return algorithm.local_rule(plan, algorithm.parameters)


def algorithm_names() -> list[str]:
    """Return the names of all installed algorithms, sorted."""
    return sorted(_installed())


def algorithm_class(name: str) -> type[Algorithm]:
    """Return the algorithm registered under ``name`` by an installed package.

    Raises:
        PlanInvalid: No installed package registers that name.

    """
    entry = _installed().get(name)
    if entry is None:
        raise PlanInvalid(f"algorithm.name: unknown algorithm {name!r}; installed are {', '.join(algorithm_names())}")
    cls = entry.load()
    if not (isinstance(cls, type) and issubclass(cls, Algorithm)):
        raise PlanInvalid(f"algorithm.name: {name!r} is registered, but is not an Algorithm")
    return cls
