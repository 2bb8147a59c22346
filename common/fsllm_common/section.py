"""What every part of a file that people write is read into: a plan's, a site's policy's, an algorithm's parameters."""

from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, model_validator


class Section(BaseModel):
    """Immutable, and strict about unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _refuse_truth(cls, given: object) -> object:
        """Have true and false refused where a number is meant, by making them the words that they are in a file.

        Python takes them for 1 and 0. Pydantic's strict mode would refuse more: YAML 1.1 has 1e-4 for a word.
        """
        if not isinstance(given, dict):
            return given
        numbers = [key for key in given if key in cls.model_fields and _is_number(cls.model_fields[key].annotation)]
        return {**given, **{key: _worded(given[key]) for key in numbers}}


def _worded(given: object) -> object:
    if isinstance(given, bool):
        return str(given).lower()
    return [_worded(one) for one in given] if isinstance(given, list) else given


def _is_number(annotation: Any) -> bool:  # noqa: ANN401 (a type expression)
    """Tell whether values of a type may be numbers, and none is true or false."""
    kinds = set(_kinds(annotation))
    return bool(kinds & {int, float}) and bool not in kinds


def _kinds(annotation: Any) -> Iterator[Any]:  # noqa: ANN401 (a type expression)
    """Yield the types that a type expression is made of."""
    if get_origin(annotation) is Literal:
        yield from map(type, get_args(annotation))
    elif inner := get_args(annotation):
        for one in inner:
            yield from _kinds(one)
    else:
        yield annotation
