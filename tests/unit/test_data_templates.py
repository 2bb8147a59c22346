"""The named templates, letter by letter."""

from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from fsllm_client.data.rows import Example, Place, Role, Turn
from fsllm_client.data.templates import Segment, check_template, renderer
from fsllm_common.errors import PlanInvalid
from fsllm_common.plan.combinations import TEMPLATES

PLACE = Place(Path("a"), 1)
NO_TOKENIZER: PreTrainedTokenizerFast = None  # the named templates do not look at it


def instruction(input_: str = "") -> Example:
    return Example("instruction", (Turn("user", "Add.", input_), Turn("assistant", "3")), PLACE)


def chat(*turns: tuple[Role, str]) -> Example:
    return Example("chat", tuple(Turn(role, content) for role, content in turns), PLACE)


LONG = chat(("system", "Be kind."), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"), ("user", "e"))


def text(name: str, example: Example) -> str:
    """Write answers in brackets, and ! where the end-of-sequence token is asked for."""
    segments = renderer(name, NO_TOKENIZER)(example)
    return "".join(f"[{s.text}]" + "!" * s.closes if s.answer else s.text for s in segments)


def test_alpaca_is_stanfords() -> None:
    # github.com/tatsu-lab/stanford_alpaca, train.py, PROMPT_DICT
    assert text("alpaca", instruction()) == (
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n### Response:[3]!"
    )
    assert text("alpaca", instruction("1, 2")) == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n### Input:\n1, 2\n\n### Response:[3]!"
    )
    assert text("alpaca", LONG) == (
        "Be kind.\n\n### Instruction:\na\n\n### Response:[b]!\n\n### Instruction:\nc\n\n### Response:[d]!"
    )


def test_brief_has_no_empty_line_for_an_empty_input() -> None:
    assert text("brief", instruction()) == "### Instruction:\nAdd.\n### Response:\n[3]!"
    assert text("brief", instruction("1, 2")) == "### Instruction:\nAdd.\n1, 2\n### Response:\n[3]!"
    assert text("brief", LONG) == (
        "Be kind.\n### Instruction:\na\n### Response:\n[b]!\n### Instruction:\nc\n### Response:\n[d]!"
    )


def test_plain_keeps_prompt_and_completion_verbatim() -> None:
    completion = Example("completion", (Turn("user", "The capital is"), Turn("assistant", " Paris")), PLACE)
    assert text("plain", completion) == "The capital is[ Paris]!"
    assert text("plain", instruction("1, 2")) == "Add.\n1, 2\n[3]!"
    assert text("plain", LONG) == "Be kind.\na\n[b]!\nc\n[d]!"


def test_chatml_ends_turns_by_its_own_mark() -> None:
    assert text("chatml", instruction("1, 2")) == (
        "<|im_start|>user\nAdd.\n1, 2<|im_end|>\n<|im_start|>assistant\n[3<|im_end|>]"
    )
    assert text("chatml", LONG) == (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n[b<|im_end|>]"
        "\n<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n[d<|im_end|>]"
    )


@pytest.mark.parametrize("name", TEMPLATES[1:])
def test_plain_text_passes_through_no_template(name: str) -> None:
    example = Example("text", (Turn("assistant", "once"),), PLACE)
    assert renderer(name, NO_TOKENIZER)(example) == [Segment("once", answer=True, closes=True)]


def test_an_unknown_template_lists_the_known_ones() -> None:
    with pytest.raises(PlanInvalid, match=r"'vicuna'.*tokenizer, alpaca, chatml, brief, plain"):
        check_template("vicuna")
    with pytest.raises(PlanInvalid, match="vicuna"):
        renderer("vicuna", NO_TOKENIZER)
