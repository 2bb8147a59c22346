"""Examples become token ids and labels, with loss on the answers only.

Every segment is tokenised on its own and the ids are joined. A tokenizer run over prompt and answer together may merge
their touching ends into one token (``:`` + ``\\n``, ``\\n`` + ``#``), and then the boundary falls inside a token and
the prompt that was trained on is not the prompt that generation starts from. Joined ids make the two equal, exactly.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING, Final, NamedTuple, cast

import numpy as np
import numpy.typing as npt

from fsllm_client.data.rows import Example
from fsllm_client.data.templates import Segment, renderer
from fsllm_common.errors import ModelUnusable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED: Final = -100
"""The label of a token that is not trained: torch's and transformers' own."""

_ROWS_A_CALL: Final = 512  # enough for a fast tokenizer to use its threads, few enough to report progress

Ids = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True, eq=False)
class Encoded:
    """One example as the model sees it."""

    input_ids: Ids  # (tokens,)
    labels: Ids  # (tokens,): the token's own id where it is trained, else IGNORED; the first is never trained
    prompt_tokens: int  # input_ids[:prompt_tokens] is the prompt of the last answer; 0 for plain text
    reference: str | None  # the last answer, whole; None for plain text, or where the last answer was cut off
    rejected: "Encoded | None" = None  # of a preference, whose chosen side this is

    @property
    def sides(self) -> "tuple[Encoded, ...]":
        """The sequences of the example: one, or a preference's two."""
        return (self,) if self.rejected is None else (self, self.rejected)

    @property
    def prompt_ids(self) -> Ids:
        """The prompt of the last answer, from which generation starts. Shape (prompt_tokens,)."""
        return self.input_ids[: self.prompt_tokens]

    @property
    def answer_tokens(self) -> int:
        """How many losses there are: one an answer token, or one a preference."""
        if self.rejected is not None:
            return 1
        return int(np.count_nonzero(self.labels != IGNORED))

    def __len__(self) -> int:
        """Return the number of tokens."""
        return len(self.input_ids)


@dataclass(slots=True)
class Tally:
    """What became of the rows."""

    encoded: int = 0
    truncated: int = 0
    """Encoded, but cut at the end to the longest allowed length."""
    without_answer: int = 0
    """Skipped: the row's answers are blank, or there are none."""
    cut_off: int = 0
    """Skipped: the prompt alone fills the longest allowed length."""
    rewritten: int = 0
    """Encoded, but the chat template rewrites earlier turns, so that only the later answers are trained."""

    @property
    def skipped(self) -> int:
        """Rows that no sequence comes from."""
        return self.without_answer + self.cut_off


@dataclass(frozen=True, slots=True)
class Special:
    """The ids that frame an example."""

    bos: int | None
    """Put first; ``None`` where the tokenizer itself would not."""
    eos: int
    pad: int
    """Any id does: padding is kept out by the attention and has no loss."""


def special_ids(tokenizer: "PreTrainedTokenizerBase") -> Special:
    """Return the ids that frame an example.

    Raises:
        ModelUnusable: the tokenizer has no end-of-sequence token, so no answer could ever end.

    """
    eos = _one_id(tokenizer.eos_token_id)
    if eos is None:
        raise ModelUnusable(
            "MODEL_UNSUITABLE",
            "The model's tokenizer names no end-of-sequence token.",
            cure="Name its eos_token in the model folder's tokenizer_config.json.",
        )
    pad = _one_id(tokenizer.pad_token_id)
    # Asked of a call rather than of an attribute: tokenizers differ in what they call the setting.
    bos = _one_id(tokenizer.bos_token_id)
    begins = cast("list[int]", tokenizer("a")["input_ids"])
    return Special(bos if begins[:1] == [bos] else None, eos, eos if pad is None else pad)


def _one_id(value: object) -> int | None:
    return value if isinstance(value, int) else None


def encode(
    examples: Sequence[Example],
    *,
    tokenizer: "PreTrainedTokenizerBase",
    template: str,
    max_length: int,
    tally: Tally,
    progress: Callable[[int], None] = lambda rows: None,
) -> list[Encoded]:
    """Encode examples in their order, leaving out those of which no answer token would be trained.

    Args:
        examples: The rows.
        tokenizer: The base model's.
        template: A name of ``templates.TEMPLATES``.
        max_length: Longer examples lose their end.
        tally: Counts what happened; added to.
        progress: Called now and then with the number of rows done since the last call.

    Raises:
        PlanInvalid: the template is unknown or not to be had from this tokenizer.
        DataInvalid: the model's chat template refuses a conversation.
        ModelUnusable: the tokenizer has no end-of-sequence token.

    """
    render = renderer(template, tokenizer)
    special = special_ids(tokenizer)
    encoded: list[Encoded] = []
    for start in range(0, len(examples), _ROWS_A_CALL):
        chunk = examples[start : start + _ROWS_A_CALL]
        rendered = [render(side) for example in chunk for side in example.sides]
        ids = iter(_tokenise(tokenizer, [segment.text for segments in rendered for segment in segments]))
        segments = iter(rendered)

        def take(side: Example, tally: Tally) -> Encoded | None:
            written = next(segments)  # noqa: B023 (called in this pass of the loop)
            pieces = [next(ids) for _ in written]  # noqa: B023
            # A chat template writes the beginning itself; all else gets what the tokenizer puts before any text.
            bos = None if template == "tokenizer" and side.format != "text" else special.bos
            return _assemble(side, _closed(written, pieces, special.eos), bos, max_length, tally)

        for example in chunk:
            one = take(example, tally) if example.rejected is None else _pair(example, take, tally)
            if one is not None:
                encoded.append(one)
        progress(len(chunk))
    return encoded


def _pair(example: Example, take: Callable[[Example, Tally], Encoded | None], tally: Tally) -> Encoded | None:
    """Return a preference, whose sides have losses on their last answers only, or None when a side has none."""
    ofs = (Tally(), Tally())
    chosen, rejected = (take(side, of) for side, of in zip(example.sides, ofs, strict=True))
    if chosen is None or rejected is None or chosen.reference is None or rejected.reference is None:
        blank = any(of.without_answer for of in ofs)
        tally.without_answer += blank
        tally.cut_off += not blank
        return None
    for side in (chosen, rejected):
        side.labels[: side.prompt_tokens] = IGNORED
    tally.encoded += 1
    tally.truncated += any(of.truncated for of in ofs)
    tally.rewritten += any(of.rewritten for of in ofs)
    return replace(chosen, rejected=rejected)


def _tokenise(tokenizer: "PreTrainedTokenizerBase", texts: list[str]) -> list[list[int]]:
    if not texts:
        return []
    # verbose=False: a warning about the model's longest input is not for here, where examples are cut.
    return cast("list[list[int]]", tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"])


class _Piece(NamedTuple):
    ids: list[int]
    answer: bool


def _closed(segments: list[Segment], ids: list[list[int]], eos: int) -> list[_Piece]:
    """End answers with ``eos``: where the template says so, and the last one always (its end mark may be another)."""
    last = max((index for index, segment in enumerate(segments) if segment.answer), default=None)
    pieces: list[_Piece] = []
    for index, (segment, piece) in enumerate(zip(segments, ids, strict=True)):
        closes = segment.answer and (segment.closes or index == last) and piece[-1:] != [eos]
        pieces.append(_Piece([*piece, eos] if closes else piece, segment.answer))
    return pieces


def _assemble(example: Example, pieces: list[_Piece], bos: int | None, max_length: int, tally: Tally) -> Encoded | None:
    answers = [turn.content for turn in example.turns if turn.role == "assistant"]
    if not any(answer.strip() for answer in answers):
        tally.without_answer += 1
        return None
    if bos is not None:
        pieces = [_Piece([bos], answer=False), *pieces]
    last = max(index for index, piece in enumerate(pieces) if piece.answer)
    prompt_tokens = sum(len(piece.ids) for piece in pieces[:last])
    total = prompt_tokens + len(pieces[last].ids)

    input_ids = np.fromiter(chain.from_iterable(piece.ids for piece in pieces), np.int32, total)[:max_length]
    trained = np.repeat([piece.answer for piece in pieces], [len(piece.ids) for piece in pieces])[:max_length]
    labels = np.where(trained, input_ids, np.int32(IGNORED)).astype(np.int32)
    # Nothing of this example stands before its first token to predict it from.
    labels[0] = IGNORED
    if not (labels != IGNORED).any():
        tally.cut_off += 1
        return None
    tally.encoded += 1
    tally.truncated += total > max_length
    tally.rewritten += sum(piece.answer for piece in pieces) < len(answers)
    if example.format == "text" or prompt_tokens >= max_length:
        return Encoded(input_ids, labels, 0, None)
    return Encoded(input_ids, labels, prompt_tokens, answers[-1])
