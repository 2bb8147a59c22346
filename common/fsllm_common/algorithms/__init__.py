"""One file an algorithm, its server half and its client half side by side, and the registry that finds them by name."""

from __future__ import annotations

import functools
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING

from fsllm_common.algorithms.algorithm import ADAPTER, FACTORS, Algorithm, BaseDelta, Block, Refusal, Update
from fsllm_common.algorithms.fedavg import FedAvg
from fsllm_common.algorithms.local_rule import LocalRule, LocalStep, Parameters, Turn, changes
from fsllm_common.errors import PlanInvalid

if TYPE_CHECKING:
    from fsllm_common.plan import Plan

__all__ = [
    "ADAPTER",
    "FACTORS",
    "Algorithm",
    "BaseDelta",
    "Block",
    "FedAvg",
    "LocalRule",
    "LocalStep",
    "Parameters",
    "Refusal",
    "Turn",
    "Update",
    "algorithm_class",
    "algorithm_names",
    "changes",
    "is_built_in",
    "local_rule",
    "package_of",
]

_GROUP = "fsllm.algorithms"


@functools.cache
def _installed() -> dict[str, EntryPoint]:
    """Return the registered algorithms by name. Kept, because finding them reads every installed package's metadata.

    fsllm's own names are fsllm's, whatever other packages register.
    """
    found = sorted(entry_points(group=_GROUP), key=_is_ours)
    return {entry.name: entry for entry in found}


def _is_ours(entry: EntryPoint) -> bool:
    return entry.module.startswith(f"{__name__}.")


def local_rule(plan: Plan) -> LocalRule:
    """Return a fresh local rule of the plan's algorithm, for one round.

    Raises:
        PlanInvalid: No installed package registers the algorithm.

    """
    algorithm = algorithm_class(plan.algorithm.name)(plan)
    return algorithm.rule()(plan, algorithm.parameters)


def algorithm_names() -> list[str]:
    """Return the names of all installed algorithms, sorted."""
    return sorted(_installed())


def is_built_in(name: str) -> bool:
    """Tell whether this is a method of fsllm itself, rather than of another package."""
    entry = _installed().get(name)
    return entry is not None and _is_ours(entry)


def package_of(name: str) -> str:
    """Return name and version of the package that a method comes from; empty for fsllm's own and for unknown ones."""
    entry = _installed().get(name)
    if entry is None or entry.dist is None or _is_ours(entry):
        return ""
    return f"{entry.dist.name} {entry.dist.version}"


def algorithm_class(name: str) -> type[Algorithm]:
    """Return the algorithm registered under ``name`` by an installed package.

    Raises:
        PlanInvalid: No installed package registers that name, or its package can not be loaded.

    """
    entry = _installed().get(name)
    if entry is None:
        raise PlanInvalid(f"algorithm.name: unknown algorithm {name!r}; installed are {', '.join(algorithm_names())}")
    try:
        cls = entry.load()
    except (ImportError, AttributeError) as error:
        raise PlanInvalid(
            f"algorithm.name: {name!r} is registered as {entry.value}, which can not be loaded: {error}",
            cure="Install the package that registers it again, with what it needs.",
        ) from error
    if not (isinstance(cls, type) and issubclass(cls, Algorithm)):
        raise PlanInvalid(f"algorithm.name: {name!r} is registered, but is not an Algorithm")
    return cls
