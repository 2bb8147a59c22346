"""One record of a file becomes one ``Example``, whichever names and format the file uses."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final, Literal, Self, cast, get_args

from fsllm_common.errors import DataInvalid
from fsllm_common.plan.schema import Data, FieldName

Format = Literal["instruction", "completion", "chat", "text", "preference"]
Role = Literal["system", "user", "assistant"]

REQUIRED: Final[dict[Format, tuple[FieldName, ...]]] = {
    "chat": ("messages",),
    "instruction": ("instruction", "output"),
    "completion": ("prompt", "completion"),
    "text": ("text",),
}
"""The fields that make a format, in the order in which formats are tried. Text comes last: datasets often carry a
rendered ``text`` beside the fields it was made from. Preferences are never tried: the algorithm must want them."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a row stands, for people."""

    file: Path
    number: int
    unit: Literal["line", "row"] = "line"

    def __str__(self) -> str:
        """Return e.g. ``/data/a.jsonl, line 3``."""
        return f"{self.file}, {self.unit} {self.number}"


class FieldsUnknown(DataInvalid):
    """The fields have names of the site's own, which a plan must map."""


@dataclass(frozen=True, slots=True)
class Turn:
    """What one side says. ``input`` is an instruction's separate input, empty everywhere else."""

    role: Role
    content: str
    input: str = ""


@dataclass(frozen=True, slots=True)
class Example:
    """A row of a site's data: a conversation to be answered, or plain text (one assistant turn and no prompt).

    ``rejected`` is what a preference has besides: the answer that the last one is preferred to.

    Two examples are equal when their content is, wherever they stand.
    """

    format: Format
    turns: tuple[Turn, ...]
    place: Place = field(compare=False)
    rejected: str | None = None

    @property
    def sides(self) -> tuple[Self, ...]:
        """The conversations that the row holds: itself, or a preference's chosen and rejected one."""
        if self.rejected is None:
            return (self,)
        *prompt, answer = self.turns
        other = (*prompt, replace(answer, content=self.rejected))
        return replace(self, rejected=None), replace(self, turns=other, rejected=None)

    @property
    def reference(self) -> str | None:
        """The last answer, which exact match compares with; ``None`` for plain text."""
        if self.format == "text":
            return None
        return next((turn.content for turn in reversed(self.turns) if turn.role == "assistant"), None)


def detect_format(record: Mapping[str, object], data: Data, place: Place) -> Format:
    """Return the plan's format, or for ``auto`` the first whose fields the record has (mapped ones go first).

    Raises:
        FieldsUnknown: no format fits.

    """
    if data.format != "auto":
        return data.format
    mapped_first = sorted(REQUIRED, key=lambda name: not set(REQUIRED[name]) & set(data.fields))
    for name in mapped_first:
        if all(_file_name(ours, data) in record for ours in REQUIRED[name]):
            return name
    wanted = "; ".join(" and ".join(_file_name(ours, data) for ours in fields) for fields in REQUIRED.values())
    raise FieldsUnknown(
        f"{place}: the row has the fields of no known format, which are: {wanted}.",
        cure="Name the file's own fields in the plan, e.g. data: {fields: {instruction: question, output: answer}}.",
    )


def example_from_record(record: Mapping[str, object], format_: Format, data: Data, place: Place) -> Example:
    """Return the record as an example.

    Raises:
        DataInvalid: a field is missing or not of its type. Names the field and the place, never the content.

    """

    def text(ours: FieldName) -> str:
        return _text(record, _file_name(ours, data), place)

    rejected: str | None = None
    if format_ == "preference":
        chosen, rejected = (_answer(record, _file_name(ours, data), place) for ours in ("chosen", "rejected"))
        turns = (*_prompt(record, _file_name("prompt", data), place), Turn("assistant", chosen))
    elif format_ == "chat":
        turns = _messages(record, _file_name("messages", data), place)
    elif format_ == "instruction":
        # An absent or null input is the common way to say that there is none.
        has_input = record.get(_file_name("input", data)) is not None
        turns = (
            Turn("user", text("instruction"), text("input") if has_input else ""),
            Turn("assistant", text("output")),
        )
    elif format_ == "completion":
        turns = (Turn("user", text("prompt")), Turn("assistant", text("completion")))
    else:
        turns = (Turn("assistant", text("text")),)
    return Example(format_, turns, place, rejected)


def _prompt(record: Mapping[str, object], name: str, place: Place) -> tuple[Turn, ...]:
    """Return a preference's prompt: text, or the messages so far."""
    if isinstance(record.get(name), list):
        return _messages(record, name, place)
    return (Turn("user", _text(record, name, place)),)


def _answer(record: Mapping[str, object], name: str, place: Place) -> str:
    """Return one of a preference's answers: text, or a list with one message of the assistant."""
    if not isinstance(record.get(name), list):
        return _text(record, name, place)
    turns = _messages(record, name, place)
    if [turn.role for turn in turns] != ["assistant"]:
        raise DataInvalid(
            f"{place}: '{name}' is not one message of the assistant.",
            cure="Put what chosen and rejected have in common into the prompt.",
        )
    return turns[0].content


def _file_name(ours: FieldName, data: Data) -> str:
    return data.fields.get(ours, ours)


def _text(record: Mapping[str, object], name: str, place: Place) -> str:
    value = record.get(name)
    if value is None:
        raise DataInvalid(f"{place}: the field '{name}' is missing or null.")
    if not isinstance(value, str):
        raise DataInvalid(f"{place}: the field '{name}' is not text.")
    try:
        # JSON can escape half of a surrogate pair, which no tokenizer takes.
        value.encode()
    except UnicodeEncodeError as error:
        raise DataInvalid(f"{place}: the field '{name}' is not valid Unicode.") from error
    return value


def _messages(record: Mapping[str, object], name: str, place: Place) -> tuple[Turn, ...]:
    value = record.get(name)
    if isinstance(value, str):  # a CSV file can hold messages only as JSON text
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise DataInvalid(f"{place}: the field '{name}' is neither a list of messages nor JSON.") from error
    if not isinstance(value, list) or not value:
        raise DataInvalid(f"{place}: the field '{name}' is missing or not a list of messages.")
    turns: list[Turn] = []
    for index, message in enumerate(value, start=1):
        if not isinstance(message, dict):
            raise DataInvalid(f"{place}: message {index} of '{name}' is not an object with role and content.")
        role = message.get("role")
        if role not in get_args(Role):
            raise DataInvalid(f"{place}: message {index} of '{name}' has no role of system, user, assistant.")
        content = _text(message, "content", place)
        turns.append(Turn(cast("Role", role), content))
    return tuple(turns)
