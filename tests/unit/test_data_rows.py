"""Records of every format and naming become the same examples."""

import json
from pathlib import Path
from typing import Any

import pytest

from fsllm_client.data.rows import Example, Place, Turn, detect_format, example_from_record
from fsllm_common.errors import DataInvalid
from fsllm_common.plan.schema import Data

PLACE = Place(Path("/data/a.jsonl"), 7)


def example(record: dict[str, Any], **data: object) -> Example:
    plan = Data.model_validate(data)
    return example_from_record(record, detect_format(record, plan, PLACE), plan, PLACE)


@pytest.mark.parametrize(
    ("record", "format_", "turns"),
    [
        (
            {"instruction": "a", "input": "b", "output": "c"},
            "instruction",
            (Turn("user", "a", "b"), Turn("assistant", "c")),
        ),
        (
            {"instruction": "a", "input": None, "output": "c"},
            "instruction",
            (Turn("user", "a"), Turn("assistant", "c")),
        ),
        ({"instruction": "a", "output": "c"}, "instruction", (Turn("user", "a"), Turn("assistant", "c"))),
        ({"prompt": "a", "completion": "c", "other": 5}, "completion", (Turn("user", "a"), Turn("assistant", "c"))),
        (
            {"messages": [{"role": "system", "content": "s"}, {"role": "assistant", "content": "c", "name": "x"}]},
            "chat",
            (Turn("system", "s"), Turn("assistant", "c")),
        ),
        (
            {"messages": json.dumps([{"role": "user", "content": "a"}])},
            "chat",
            (Turn("user", "a"),),
        ),
        ({"text": "t"}, "text", (Turn("assistant", "t"),)),
        # A rendered text beside the fields it was made from is not preferred.
        (
            {"instruction": "a", "output": "c", "text": "a c"},
            "instruction",
            (Turn("user", "a"), Turn("assistant", "c")),
        ),
    ],
)
def test_formats_are_known_by_their_fields(record: dict[str, Any], format_: str, turns: tuple[Turn, ...]) -> None:
    found = example(record)
    assert (found.format, found.turns) == (format_, turns)


def test_fields_can_be_mapped() -> None:
    found = example({"question": "q", "answer": "a"}, fields={"prompt": "question", "completion": "answer"})
    assert found.turns == (Turn("user", "q"), Turn("assistant", "a"))
    found = example(
        {"instruction": "i", "context": "c", "response": "r"}, fields={"input": "context", "output": "response"}
    )
    assert found.turns == (Turn("user", "i", "c"), Turn("assistant", "r"))


def test_mapping_a_field_prefers_its_format() -> None:
    record = {"instruction": "i", "output": "o", "body": "b"}
    assert example(record, fields={"text": "body"}).format == "text"
    assert example(record).format == "instruction"


def test_the_plan_can_name_the_format() -> None:
    assert example({"instruction": "i", "output": "o", "text": "t"}, format="text").turns == (Turn("assistant", "t"),)
    with pytest.raises(DataInvalid, match=r"a\.jsonl, line 7: the field 'prompt' is missing"):
        example({"instruction": "i", "output": "o"}, format="completion")


def test_the_reference_is_the_last_answer() -> None:
    chat = [
        {"role": r, "content": c} for r, c in [("user", "1"), ("assistant", "2"), ("assistant", "3"), ("user", "4")]
    ]
    assert example({"messages": chat}).reference == "3"
    assert example({"text": "t"}).reference is None


def test_equality_is_of_content() -> None:
    record = {"text": "t"}
    assert example(record) == example_from_record(record, "text", Data(), Place(Path("b"), 1))
    assert example(record) != example({"text": "u"})


@pytest.mark.parametrize(
    ("record", "data", "what"),
    [
        ({"question": "Jane"}, {}, "no known format"),
        ({"question": "Jane"}, {"fields": {"prompt": "q", "completion": "answer"}}, "q and answer"),
        ({"instruction": "Jane", "output": None}, {}, "'output' is missing or null"),
        ({"instruction": "Jane", "output": 3}, {}, "'output' is not text"),
        ({"instruction": "Jane", "output": "x", "input": ["Jane"]}, {}, "'input' is not text"),
        ({"text": "Jane \udc00"}, {}, "not valid Unicode"),
        ({"messages": []}, {}, "not a list of messages"),
        ({"messages": None}, {"format": "chat"}, "not a list of messages"),
        ({"messages": "Jane"}, {}, "neither a list of messages nor JSON"),
        ({"messages": ["Jane"]}, {}, "message 1 of 'messages' is not an object"),
        ({"messages": [{"role": "user", "content": "Jane"}, {"role": "Jane", "content": "x"}]}, {}, "message 2"),
        ({"messages": [{"role": ["Jane"], "content": "x"}]}, {}, "has no role"),
        ({"messages": [{"role": "user", "content": ["Jane"]}]}, {}, "'content' is not text"),
        ({"messages": [{"role": "user"}]}, {}, "'content' is missing"),
    ],
)
def test_what_is_wrong_is_said_with_its_place_and_without_content(
    record: dict[str, Any], data: dict[str, Any], what: str
) -> None:
    with pytest.raises(DataInvalid) as caught:
        example(record, **data)
    assert caught.value.message.startswith("/data/a.jsonl, line 7: ")
    assert what in caught.value.message
    assert "Jane" not in caught.value.message
