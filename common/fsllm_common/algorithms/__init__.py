"""One file an algorithm, its server half and its client half side by side, and the registry that finds them by name."""

from importlib.metadata import entry_points

from fsllm_common.algorithms.interface import Algorithm, LocalRule, Update
from fsllm_common.errors import PlanInvalid

__all__ = ["Algorithm", "LocalRule", "Update", "algorithm_class", "algorithm_names"]

_GROUP = "fsllm.algorithms"


def algorithm_names() -> list[str]:
    """Return the names of all installed algorithms, sorted."""
    return sorted({entry.name for entry in entry_points(group=_GROUP)})


def algorithm_class(name: str) -> type[Algorithm]:
    """Return the algorithm registered under ``name`` by an installed package.

    Raises:
        PlanInvalid: No installed package registers that name.

    """
    found = entry_points(group=_GROUP, name=name)
    if not found:
        raise PlanInvalid(f"algorithm.name: unknown algorithm {name!r}; installed are {', '.join(algorithm_names())}")
    cls = next(iter(found)).load()
    if not (isinstance(cls, type) and issubclass(cls, Algorithm)):
        raise PlanInvalid(f"algorithm.name: {name!r} is registered, but is not an Algorithm")
    return cls
