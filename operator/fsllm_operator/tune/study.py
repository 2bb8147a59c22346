"""A study's file: which keys of a plan are searched, over what, how, and what is best."""

import re
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

from pydantic import (
    Discriminator,
    Field,
    JsonValue,
    PositiveInt,
    Tag,
    ValidationError,
    field_validator,
    model_validator,
)

from fsllm_common.errors import PlanInvalid
from fsllm_common.plan import file_contents
from fsllm_common.section import Section

CURE: Final = "docs/tune.md lists a study's keys; `fsllm tune STUDY --check` looks at it again and starts nothing."

_HELD: Final = ("name", "evaluate")
"""Keys that no trial changes: with another measurement its objective would be no answer to the same question."""


class Range(Section):
    """Numbers between two ends, both included; whole numbers when both ends are written as such."""

    low: int | float
    high: int | float
    log: bool = Field(default=False, description="Draw the logarithm evenly: for learning rates and the like.")
    step: int | float | None = Field(default=None, gt=0, description="Only low, low + step, ...; unset: any number.")

    @property
    def whole(self) -> bool:
        """Whether only whole numbers are drawn."""
        return isinstance(self.low, int) and isinstance(self.high, int) and not isinstance(self.step, float)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.low < self.high:
            raise ValueError(f"low ({self.low}) must be less than high ({self.high})")
        if self.log and self.low <= 0:
            raise ValueError(f"with log, low must be more than 0, not {self.low}")
        if self.log and self.step is not None:
            raise ValueError("log and step do not go together")
        if self.step is not None and not self._steps_lead_there(self.step):
            raise ValueError(f"no whole number of steps of {self.step} leads from {self.low} to {self.high}")
        return self

    def _steps_lead_there(self, step: float) -> bool:
        try:
            return not (Decimal(str(self.high)) - Decimal(str(self.low))) % Decimal(str(step))
        except InvalidOperation:  # more steps than its 28 digits can count
            return False


class Choices(Section):
    """Values without an order: numbers, words, lists, or whole sections."""

    choices: tuple[JsonValue, ...] = Field(min_length=2)

    @field_validator("choices", mode="before")
    @classmethod
    def _read_numbers(cls, given: object) -> object:
        """Take 1e-4 for a number: YAML 1.1 takes it for a word, as it has no dot."""
        return [_number(choice) for choice in given] if isinstance(given, list) else given

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len({repr(choice) for choice in self.choices}) < len(self.choices):
            raise ValueError("a choice is given twice")
        return self


def _number(given: object) -> object:
    return float(given) if isinstance(given, str) and re.fullmatch(r"[-+]?\d+[eE][-+]?\d+", given) else given


def _kind(given: object) -> str:
    return "choices" if isinstance(given, Choices) or (isinstance(given, dict) and "choices" in given) else "range"


Dimension = Annotated[
    Annotated[Range, Tag("range")] | Annotated[Choices, Tag("choices")],
    Discriminator(_kind),
]


class Objective(Section):
    """What makes a plan better than another: a metric after its last round."""

    metric: str = Field(default="loss", description="One of the plan's evaluate.metrics.")
    whose: Literal["sites", "evaluators"] = Field(
        default="sites",
        description="Measured by the sites on their validation rows, or by evaluators on the held-out file; the mean, "
        "weighted by what each measured.",
    )
    direction: Literal["minimize", "maximize"] = Field(
        default="minimize", description="Unset: maximize for exact_match and reward_accuracy, minimize for any other."
    )

    @model_validator(mode="before")
    @classmethod
    def _choose(cls, given: object) -> object:
        rises = ("exact_match", "reward_accuracy")
        if isinstance(given, dict) and "direction" not in given and given.get("metric") in rises:
            return {**given, "direction": "maximize"}
        return given

    @property
    def key(self) -> tuple[str, str]:
        """Where ``Round.metrics`` has it."""
        return ("validation" if self.whose == "sites" else "held-out", self.metric)


class Halving(Section):
    """End the worse trials early: at each rung only the best 1/factor of all that came so far go on."""

    factor: int = Field(default=3, ge=2)
    min_rounds: PositiveInt = Field(default=1, description="The first rung; the next are factor times further each.")


class Study(Section):
    """The whole study."""

    name: str = Field(
        pattern=r"^[a-z0-9]([a-z0-9-]{0,53}[a-z0-9])?$", description="Its runs are called NAME-0, NAME-1, ..."
    )
    plan: Path = Field(description="The base plan's file, relative to this one.")
    space: dict[str, Dimension] = Field(
        min_length=1,
        description="Dotted key of the plan: {low, high, log, step} or {choices}. A number stands for a list's item, "
        "counted from 0: pipeline.0.norm.",
    )
    objective: Objective = Objective()
    method: Literal["random", "halving", "tpe"] = Field(
        default="tpe",
        description="random; halving: random, and the worse trials end early; tpe: Bayesian, learns from trials "
        "before (with a halving section it ends the worse ones early too).",
    )
    halving: Halving | None = Field(default=None, description="Unset: only with method halving, with its defaults.")
    startup: PositiveInt = Field(default=10, description="Random trials before tpe begins to learn.")
    trials: PositiveInt = Field(default=20, description="In all, over every call; may be raised later.")
    parallel: PositiveInt = Field(default=1, description="Trials under way at the same time.")
    seed: int = Field(default=0, ge=0, lt=2**31, description="Of the search; the plans keep their own.")
    failed_trials: PositiveInt = Field(default=3, description="So many failures in a row end the command.")

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, given: object) -> object:
        if isinstance(given, dict) and given.get("method") == "halving" and given.get("halving") is None:
            return {**given, "halving": {}}
        return given

    @model_validator(mode="after")
    def _check(self) -> Self:
        for key in self.space:
            if key.split(".")[0] in _HELD:
                raise ValueError(f"space: {key} can not be searched: a study measures all trials alike")
            if (inside := [other for other in self.space if other.startswith(f"{key}.")]) and inside:
                raise ValueError(f"space: {key} and {inside[0]} overlap")
        if self.halving is not None and "rounds" in self.space:
            raise ValueError("space: rounds can not be searched with halving, which compares trials round by round")
        return self

    def definition(self) -> dict[str, Any]:
        """Return what must not change while the study goes on."""
        return self.model_dump(mode="json", exclude={"plan", "trials", "parallel", "failed_trials"})


def study_from_file(path: Path) -> Study:
    """Read a study from a .yaml, .yml, .toml or .json file.

    Raises:
        PlanInvalid: The file can not be read, a key is unknown, or a value wrong.

    """
    raw = file_contents(path, kind="study", cure=CURE)
    if not isinstance(raw, dict):
        raise PlanInvalid(f"{path}: a study is a mapping of keys to values", cure=CURE)
    try:
        return Study.model_validate(raw)
    except ValidationError as error:
        # Of a place that may hold whole numbers or others, what is said last: of others.
        told = {_place(one["loc"]): _explain(one["msg"], one["type"]) for one in error.errors(include_url=False)}
        texts = [": ".join(filter(None, place_and_text)) for place_and_text in told.items()]
        raise PlanInvalid(f"{path}: {'; '.join(texts[:10])}", cure=CURE) from error


def _place(location: tuple[int | str, ...]) -> str:
    # Pydantic puts the tag of the dimension's kind behind its key, and the type behind a range's.
    if location[:1] == ("space",):
        location = (*location[:2], *location[3:4], *(step for step in location[4:] if step not in ("int", "float")))
    return ".".join(map(str, location))


def _explain(message: str, kind: str) -> str:
    text = {"extra_forbidden": "unknown key", "missing": "this key is required"}.get(kind)
    text = text or message.removeprefix("Value error, ")
    return text[:1].lower() + text[1:]
