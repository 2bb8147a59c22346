r"""How an example is written out as text: segments that are prompt, and segments that are answer.

==========  ===========================================================================================================
tokenizer   the chat template that comes with the model
alpaca      Stanford Alpaca's prompt (github.com/tatsu-lab/stanford_alpaca), with or without an input
chatml      ``<|im_start|>role\n...<|im_end|>\n``
brief       ``### Instruction:\n...\n### Response:\n``
plain       what the row holds and no more: a prompt and its completion verbatim, else each turn on its own line
==========  ===========================================================================================================

An instruction's input goes below it on its own line, except in alpaca, which has a heading for it. Plain text passes
through no template. What follows the last answer is dropped: nothing in it is trained.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from fsllm_client.data.rows import Example, Turn
from fsllm_common.errors import DataInvalid, PlanInvalid
from fsllm_common.plan.combinations import TEMPLATES

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of text that is all prompt or all answer. ``closes``: the tokenizer's end-of-sequence token follows."""

    text: str
    answer: bool = False
    closes: bool = False


Renderer = Callable[[Example], list[Segment]]


def check_template(name: str) -> None:
    """Raise ``PlanInvalid``, listing the known ones, unless ``name`` is a template."""
    if name not in TEMPLATES:
        raise PlanInvalid(f"data.template: there is no template '{name}'. Known are {', '.join(TEMPLATES)}.")


def renderer(name: str, tokenizer: "PreTrainedTokenizerBase") -> Renderer:
    """Return the function that writes examples out. An example without an answer gives segments without one.

    Raises:
        PlanInvalid: the name is unknown, or the tokenizer has no chat template and ``name`` asks for it.

    """
    check_template(name)
    if name == "tokenizer":
        if not tokenizer.chat_template:
            raise PlanInvalid(
                "data.template: the model's tokenizer has no chat template.",
                cure=f"Set data.template to one of {', '.join(TEMPLATES[1:])}.",
            )
        return lambda example: _text(example) or _by_tokenizer(example, tokenizer)
    return lambda example: _text(example) or _NAMED[name](example)


def _text(example: Example) -> list[Segment]:
    return [Segment(example.turns[0].content, answer=True, closes=True)] if example.format == "text" else []


def _with_input(turn: Turn) -> str:
    return f"{turn.content}\n{turn.input}" if turn.input else turn.content


def _join(
    turns: tuple[Turn, ...], prompt: Callable[[Turn], str], before_answer: str, after_answer: str
) -> list[Segment]:
    """Alternate prompt and answer, each answer closed by the end-of-sequence token."""
    segments: list[Segment] = []
    pending = ""
    for turn in turns:
        if turn.role == "assistant":
            segments += [Segment(pending + before_answer), Segment(turn.content, answer=True, closes=True)]
            pending = after_answer
        else:
            pending += prompt(turn)
    return segments


def _alpaca(example: Example) -> list[Segment]:
    paired = any(turn.input for turn in example.turns)
    preamble = (
        "Below is an instruction that describes a task"
        + (", paired with an input that provides further context. " if paired else ". ")
        + "Write a response that appropriately completes the request.\n\n"
    )

    def prompt(turn: Turn) -> str:
        if turn.role == "system":
            return f"{turn.content}\n\n"
        block = f"### Instruction:\n{turn.content}\n\n"
        return f"{block}### Input:\n{turn.input}\n\n" if turn.input else block

    segments = _join(example.turns, prompt, "### Response:", "\n\n")
    if segments and not any(turn.role == "system" for turn in example.turns):  # else it stands in the preamble's place
        segments[0] = Segment(preamble + segments[0].text)
    return segments


def _brief(example: Example) -> list[Segment]:
    def prompt(turn: Turn) -> str:
        return f"{turn.content}\n" if turn.role == "system" else f"### Instruction:\n{_with_input(turn)}\n"

    return _join(example.turns, prompt, "### Response:\n", "\n")


def _plain(example: Example) -> list[Segment]:
    if example.format == "completion" or (example.format == "preference" and len(example.turns) == 2):
        return _join(example.turns, lambda turn: turn.content, "", "")
    return _join(example.turns, lambda turn: f"{_with_input(turn)}\n", "", "\n")


def _chatml(example: Example) -> list[Segment]:
    segments: list[Segment] = []
    pending = ""
    for turn in example.turns:
        if turn.role == "assistant":
            segments += [
                Segment(f"{pending}<|im_start|>assistant\n"),
                Segment(f"{turn.content}<|im_end|>", answer=True),
            ]
            pending = "\n"
        else:
            pending += f"<|im_start|>{turn.role}\n{_with_input(turn)}<|im_end|>\n"
    return segments


_NAMED: Final[dict[str, Callable[[Example], list[Segment]]]] = {
    "alpaca": _alpaca,
    "brief": _brief,
    "chatml": _chatml,
    "plain": _plain,
}


def _by_tokenizer(example: Example, tokenizer: "PreTrainedTokenizerBase") -> list[Segment]:
    """Let the tokenizer's template render up to each answer, with and without it; the difference is the answer.

    Some templates rewrite earlier turns (those of reasoning models drop earlier thoughts), so a rendering need not
    begin with the one before; then only the answers after the last such rewriting can be told apart, and only they are
    trained.
    """
    from jinja2 import TemplateError

    messages = [{"role": turn.role, "content": _with_input(turn)} for turn in example.turns]
    answers = [index for index, turn in enumerate(example.turns) if turn.role == "assistant"]
    end = tokenizer.eos_token if isinstance(tokenizer.eos_token, str) else ""

    def render(count: int, *, answering: bool) -> str:
        return str(tokenizer.apply_chat_template(messages[:count], tokenize=False, add_generation_prompt=answering))

    segments: list[Segment] = []
    rendered = ""
    try:
        for index in answers:
            prompt, whole = render(index, answering=True), render(index + 1, answering=False)
            if not prompt.startswith(rendered):
                segments, rendered = [], ""
            if not whole.startswith(prompt):
                if index == answers[-1]:
                    raise PlanInvalid(
                        "data.template: the tokenizer's chat template does not write an answer right after its prompt, "
                        "so the answer can not be told apart.",
                        cure=f"Set data.template to one of {', '.join(TEMPLATES[1:])}.",
                    )
                segments, rendered = [], ""
                continue
            answer = whole[len(prompt) :]
            # What a template writes after its end mark (mostly a newline) belongs to the next prompt.
            cut = answer.rfind(end) + len(end) if end and end in answer else len(answer)
            segments += [Segment(prompt[len(rendered) :]), Segment(answer[:cut], answer=True)]
            rendered = prompt + answer[:cut]
    except TemplateError:  # its message is the template's own and might quote the conversation
        raise DataInvalid(
            f"{example.place}: the model's chat template refuses this conversation (mostly for the order of its roles)."
        ) from None
    return segments
