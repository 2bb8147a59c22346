"""A study's values in its base plan, and whether every corner of the space makes a plan that a server would take."""

import itertools
import json
import math
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeAlias

from pydantic import JsonValue

from fsllm_common.algorithms import algorithm_class
from fsllm_common.errors import PlanInvalid
from fsllm_common.plan import Plan, file_contents, plan_from_file, plan_from_json
from fsllm_operator.tune.study import CURE, Choices, Dimension, Range, Study, study_from_file

Values: TypeAlias = dict[str, JsonValue]
"""Dotted key -> what a trial puts there."""

MOST_CORNERS: Final = 256
"""Checked in full up to here; beyond, each end of each key with all others at their first and at their last."""


@dataclass(frozen=True, slots=True)
class Space:
    """A study with its base plan."""

    file: Path
    study: Study
    base: dict[str, Any]
    """The base plan as its file has it."""
    plan: Plan
    """The base plan, checked and with every default."""

    @classmethod
    def read(cls, file: Path) -> "Space":
        """Read a study and its plan, and check every corner.

        Raises:
            PlanInvalid: One of the files is wrong, or a corner is.

        """
        study = study_from_file(file)
        path = file.parent / study.plan
        plan, base = plan_from_file(path), file_contents(path)
        if not isinstance(base, dict):
            raise TypeError(f"{path}: no mapping, and yet a plan")
        space = cls(file, study, base, plan)
        space._check()
        return space

    def contents(self, name: str, values: Values) -> dict[str, Any]:
        """Return the base plan as its file has it with these values and another name.

        Raises:
            PlanInvalid: A key leads nowhere.

        """
        contents = deepcopy(self.base)
        contents["name"] = name
        for key, value in values.items():
            _put(contents, key, value)
        return contents

    def plan_with(self, name: str, values: Values) -> Plan:
        """Return the plan of these values, checked as ``fsllm plan check`` does.

        Raises:
            PlanInvalid: It is refused; the message names the values.

        """
        try:
            return plan_from_json(json.dumps(self.contents(name, values), default=str).encode())
        except PlanInvalid as error:
            raise PlanInvalid(f"{self.file}: with {told(values)}: {error.message}", cure=CURE) from error

    def corners(self) -> Iterator[Plan]:
        """Yield the checked plans of the space's corners.

        Raises:
            PlanInvalid: One is refused.

        """
        for values in corners(self.study.space):
            yield self.plan_with(f"{self.study.name}-0", values)

    def definition(self) -> dict[str, Any]:
        """Return what must not change while the study goes on."""
        # As the files have it: a later fsllm may know more keys, whose defaults change nothing.
        told: dict[str, Any] = json.loads(json.dumps({**self.study.definition(), "plan": self.base}, default=str))
        return told

    def rungs(self) -> tuple[int, ...]:
        """Return the rounds after which trials are compared; none without halving."""
        halving = self.study.halving
        return () if halving is None else rungs(halving.min_rounds, halving.factor, self.plan.rounds)

    def _check(self) -> None:
        study, plan = self.study, self.plan
        metric, measured = study.objective.metric, plan.evaluate.metrics
        if metric not in measured:
            raise PlanInvalid(
                f"{self.file}: objective.metric: the plan measures {', '.join(measured)}, not {metric}",
                cure="Name one of these, or add it to the plan's evaluate.metrics.",
            )
        if study.objective.whose == "sites" and plan.data.validation_fraction == 0:
            raise PlanInvalid(
                f"{self.file}: objective.whose: the plan's data.validation_fraction is 0, so that no site measures",
                cure="Set it above 0, or let evaluators measure: objective.whose: evaluators.",
            )
        if study.halving is not None and (not self.rungs() or plan.evaluate.every == 0):
            raise PlanInvalid(
                f"{self.file}: halving: trials of {plan.rounds} rounds, measured every {plan.evaluate.every}, are "
                f"never compared before they end",
                cure="Lower halving.min_rounds, raise the plan's rounds, or set its evaluate.every to 1.",
            )
        for corner in self.corners():
            name = corner.algorithm.name
            if study.objective.whose == "evaluators" and algorithm_class(name)(corner).personalised:
                raise PlanInvalid(
                    f"{self.file}: objective.whose: with algorithm.name {name} each site has a model of its own, and "
                    "evaluators have none to measure",
                    cure="Let the sites measure theirs: objective.whose: sites.",
                )


def rungs(min_rounds: int, factor: int, rounds: int) -> tuple[int, ...]:
    """Return min_rounds x factor^k for k = 0, 1, ... as far as it is less than rounds."""
    found = itertools.takewhile(lambda rung: rung < rounds, (min_rounds * factor**k for k in itertools.count()))
    return tuple(found)


def corners(space: Mapping[str, Dimension]) -> Iterator[Values]:
    """Yield the combinations of all choices and of all ranges' ends, or a part of them that has each of these."""
    ends = [
        list(d.choices) if isinstance(d, Choices) else [_number(d, d.low), _number(d, d.high)] for d in space.values()
    ]
    if math.prod(map(len, ends)) <= MOST_CORNERS:
        combinations: Iterator[tuple[JsonValue, ...]] = itertools.product(*ends)
    else:
        combinations = (
            tuple(value if other == at else all_[rest] for other, all_ in enumerate(ends))
            for rest in (0, -1)
            for at, these in enumerate(ends)
            for value in these
        )
    for combination in combinations:
        yield dict(zip(space, combination, strict=True))


def told(values: Mapping[str, JsonValue]) -> str:
    """Return values as people read them."""
    return ", ".join(f"{key} {value_text(value)}" for key, value in values.items())


def value_text(value: JsonValue) -> str:
    """Return one value as people read it."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return value if isinstance(value, str) else json.dumps(value)


def _number(dimension: Range, value: float) -> int | float:
    return int(value) if dimension.whole else float(value)


def _put(contents: dict[str, Any], key: str, value: JsonValue) -> None:
    *sections, last = key.split(".")
    place: Any = contents
    for at, step in enumerate(sections):
        if isinstance(place, dict) and place.get(step) is None:
            place[step] = {}
        place = _step(place, step, ".".join(sections[: at + 1]))
    if isinstance(place, dict):
        place[last] = deepcopy(value)
    else:
        _step(place, last, key)
        place[int(last)] = deepcopy(value)


def _step(place: Any, step: str, key: str) -> Any:  # noqa: ANN401 (what a plan's file holds)
    if isinstance(place, dict):
        return place[step]
    if not isinstance(place, list):
        raise PlanInvalid(f"{key}: this key is not inside a section")
    if not step.isdecimal() or int(step) >= len(place):
        raise PlanInvalid(f"{key}: the base plan's list has no such item")
    return place[int(step)]
