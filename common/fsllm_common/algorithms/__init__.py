"""One file an algorithm, its server half and its client half side by side, and the registry that finds them by name."""

import functools
from importlib.metadata import EntryPoint, entry_points

from fsllm_common.algorithms.interface import Algorithm, LocalRule, Update
from fsllm_common.errors import PlanInvalid

__all__ = ["Algorithm", "LocalRule", "Update", "algorithm_class", "algorithm_names"]

_GROUP = "fsllm.algorithms"


@functools.cache
def _installed() -> dict[str, EntryPoint]:
    """Return the registered algorithms by name. Kept, because finding them reads every installed package's metadata."""
    return {entry.name: entry for entry in entry_points(group=_GROUP)}


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
