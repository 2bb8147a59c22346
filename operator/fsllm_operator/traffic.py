"""How many elements cross the wire for a site, by what a method declares and the shapes of an adapter's tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from fsllm_common.algorithms import algorithm_class
from fsllm_common.algorithms.layers import module_and_key
from fsllm_common.plan import Plan
from fsllm_common.tensors.manifest import role_of


class Traffic(NamedTuple):
    """Elements a round and site, on average over the run, without version 0."""

    down: int
    up: int
    grows: bool = False
    """The download is of a round of the quorum, and larger with each update more."""


def traffic(plan: Plan, shapes: Mapping[str, tuple[int, ...]]) -> Traffic:
    """Return what travels in a round.

    Args:
        plan: A valid plan.
        shapes: Of the adapter's tensors, by names from which their roles can be told.

    """
    algorithm = algorithm_class(plan.algorithm.name)(plan)
    every = {**shapes, **{name: array.shape for name, array in algorithm.extra(shapes).items()}}  # noqa: S610
    parts: dict[str, int] = {}
    personal: dict[str, int] = {}
    for name, shape in every.items():
        role = role_of(name)
        of = personal if role in algorithm.personal else parts
        part = algorithm.part_of(name, role)
        of[part] = of.get(part, 0) + math.prod(shape)
    down = up = 0
    for round_ in range(1, plan.rounds + 1):
        moving = algorithm.moving(round_)
        changed = algorithm.remade(round_) if algorithm.needs_layers else moving
        up += sum(parts.get(part, 0) for part in moving)
        down += sum(parts.get(part, 0) for part in changed)
    ranks = [plan.adapter.rank] * (plan.cohort.updates or plan.cohort.quorum)
    entry, more = (algorithm.base_delta(given, []) for given in (ranks, [*ranks, plan.adapter.rank]))
    if entry is not None:
        # Of each module, for one rank: a column of U and a row of V, as long as those of B and A.
        factors = sum(math.prod(shape) for name, shape in shapes.items() if module_and_key(name)[1] in ("A", "B"))
        down += factors // plan.adapter.rank * entry.rank * plan.rounds
    return Traffic(down // plan.rounds, up // plan.rounds, grows=plan.cohort.updates is None and more != entry)
