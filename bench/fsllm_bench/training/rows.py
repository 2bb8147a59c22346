"""Instruction rows of mixed lengths, made from a seed: a ward's day, told and then counted step by step.

The number of events of a day is log-normal, so the lengths of the rows are as instruction data's are: many short ones
and a long tail. The deviation of the logarithm of a row's tokens is about 0.6; GSM8K has 0.36, a set of code
instructions 0.35, free-form instructions 0.8 and more.
"""

from random import Random
from typing import Final, TypedDict

MOST_EVENTS: Final = 24
_SPREAD: Final = 0.75
_TAIL: Final = 5.0
"""The longest day has so many times the median's events: 1.6 % of the days would be longer still."""

_EVENTS: Final = (
    ("{} patients arrive from the emergency room.", 1),
    ("{} patients go home.", -1),
    ("{} beds are filled from the waiting list.", 1),
    ("{} patients are moved to another hospital.", -1),
    ("The night brings {} more.", 1),
    ("{} are discharged after the round.", -1),
)


class Row(TypedDict):
    """One line of a jsonl file."""

    instruction: str
    input: str
    output: str


def make(count: int, seed: int, most_events: int = MOST_EVENTS) -> list[Row]:
    """Return so many rows of at most so many events; the same for the same seed."""
    rng = Random(seed)  # noqa: S311  # rows to measure with, not a secret
    median = most_events / _TAIL
    return [row(max(1, min(most_events, round(median * rng.lognormvariate(0, _SPREAD)))), rng) for _ in range(count)]


def row(events: int, rng: Random) -> Row:
    """Return a day of so many events."""
    patients = rng.randint(10, 60)
    told = [f"A ward has {patients} patients."]
    counted = []
    for _ in range(events):
        text, sign = rng.choice(_EVENTS if patients else _EVENTS[::2])  # nobody leaves an empty ward
        moved = rng.randint(1, 9 if sign > 0 else min(9, patients))
        told.append(text.format(moved))
        after = patients + sign * moved
        counted.append(f"{patients} {'+' if sign > 0 else '-'} {moved} = {after}")
        patients = after
    return Row(
        instruction="How many patients does the ward have in the end?",
        input=" ".join(told),
        output="\n".join([*counted, f"#### {patients}"]),
    )
