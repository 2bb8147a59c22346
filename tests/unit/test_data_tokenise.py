"""From rows to token ids and labels, with a tokenizer trained here on a few sentences."""

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from fsllm_client.data.rows import Example, Format, Place, Role, Turn
from fsllm_client.data.site_data import load_site_data
from fsllm_client.data.tokenise import IGNORED, Encoded, Tally, encode, special_ids
from fsllm_common.errors import DataInvalid, ModelUnusable, PlanInvalid
from fsllm_common.plan import Plan

PLACE = Place(Path("rows.jsonl"), 4)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tokenizer(
    *, eos: str | None = "</s>", adds_bos: bool = False, chat_template: str | None = None
) -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>"]
    # The regex is off and the text made so that "\n4" and ":4" become tokens, which is where a boundary would get lost.
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(["### Response:\n4", "### Response:4", "\n4 4\n4:4:4", "### Instruction:\n"] * 20, trainer)
    if adds_bos:
        core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    named = {"bos_token": "<s>", "eos_token": eos, "pad_token": "<pad>", "chat_template": chat_template}
    return PreTrainedTokenizerFast(tokenizer_object=core, **named)


TOKENIZER = tokenizer()


def example(*turns: tuple[Role, str], format_: Format = "chat") -> Example:
    return Example(format_, tuple(Turn(role, content) for role, content in turns), PLACE)


def one(
    row: Example,
    template: str,
    by: PreTrainedTokenizerFast = TOKENIZER,
    max_length: int = 512,
    tally: Tally | None = None,
) -> Encoded:
    (encoded,) = encode(
        [row], tokenizer=by, template=template, max_length=max_length, tally=tally if tally is not None else Tally()
    )
    return encoded


def spelled(encoded: Encoded, by: PreTrainedTokenizerFast = TOKENIZER) -> str:
    """Write the tokens out, those with a loss in brackets, token by token."""
    pairs = zip(encoded.input_ids.tolist(), encoded.labels.tolist(), strict=True)
    return "".join(f"[{by.decode([i])}]" if label == i else by.decode([i]) for i, label in pairs).replace("][", "")


def test_the_boundary_is_between_tokens_of_prompt_and_answer_tokenised_alone() -> None:
    row = example(("user", "Two and two?"), ("assistant", "4"))
    prompt = "### Instruction:\nTwo and two?\n### Response:\n"
    prompt_ids, answer_ids = (TOKENIZER(text)["input_ids"] for text in (prompt, "4"))
    # The case is not idle: over prompt and answer together this tokenizer joins them.
    assert TOKENIZER(prompt + "4")["input_ids"] != prompt_ids + answer_ids
    encoded = one(row, "brief")
    assert encoded.input_ids.tolist() == prompt_ids + answer_ids + [TOKENIZER.eos_token_id]
    assert encoded.labels.tolist() == [IGNORED] * len(prompt_ids) + answer_ids + [TOKENIZER.eos_token_id]
    assert encoded.prompt_ids.tolist() == prompt_ids
    assert encoded.reference == "4"
    assert encoded.answer_tokens == len(answer_ids) + 1


def test_every_answer_of_a_conversation_is_trained_and_ended() -> None:
    row = example(("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"), ("user", "e"))
    encoded = one(row, "brief")
    assert spelled(encoded) == (
        "s\n### Instruction:\na\n### Response:\n[b</s>]\n### Instruction:\nc\n### Response:\n[d</s>]"
    )
    assert TOKENIZER.decode(encoded.prompt_ids).endswith("c\n### Response:\n")
    assert encoded.reference == "d"


def test_plain_text_is_trained_whole_but_for_its_first_token() -> None:
    row = example(("assistant", "xyz"), format_="text")
    encoded = one(row, "alpaca")
    assert spelled(encoded) == "x[yz</s>]"
    assert (encoded.prompt_tokens, encoded.reference) == (0, None)
    assert spelled(one(row, "alpaca", tokenizer(adds_bos=True))) == "<s>[xyz</s>]"


def test_a_beginning_is_put_first_where_the_tokenizer_would() -> None:
    row = example(("user", "a"), ("assistant", "b"))
    assert special_ids(TOKENIZER).bos is None
    with_bos = tokenizer(adds_bos=True)
    assert special_ids(with_bos).bos == with_bos.bos_token_id
    assert spelled(one(row, "plain", with_bos)) == "<s>a\n[b</s>]"
    # A chat template writes its own.
    with_bos.chat_template = CHATML
    assert spelled(one(row, "tokenizer", with_bos)).startswith("<|im_start|>user")
    # Plain text passes through no template, so nothing else would begin it.
    assert spelled(one(example(("assistant", "xy"), format_="text"), "tokenizer", with_bos)) == "<s>[xy</s>]"


def test_padding_falls_back_to_the_end_token() -> None:
    unpadded = tokenizer()
    unpadded.pad_token = None
    assert special_ids(unpadded).pad == unpadded.eos_token_id
    assert special_ids(TOKENIZER).pad == TOKENIZER.pad_token_id


def test_a_tokenizer_without_an_end_is_refused() -> None:
    with pytest.raises(ModelUnusable, match="no end-of-sequence token"):
        special_ids(tokenizer(eos=None))


CONVERSATION = example(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))


def test_the_chat_template_of_the_tokenizer() -> None:
    chatty = tokenizer(eos="<|im_end|>", chat_template=CHATML)
    encoded = one(CONVERSATION, "tokenizer", chatty)
    assert spelled(encoded, chatty) == (
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n[b<|im_end|>]\n"
        "<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n[d<|im_end|>]"
    )
    # The prompt is, id by id, what generation will be given.
    messages = [{"role": t.role, "content": t.content} for t in CONVERSATION.turns[:-1]]
    prompt = chatty.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert encoded.prompt_ids.tolist() == chatty(prompt, add_special_tokens=False)["input_ids"]
    # chatml, the named template, is the same.
    assert one(CONVERSATION, "chatml", chatty).input_ids.tolist() == encoded.input_ids.tolist()


def test_an_end_follows_the_last_answer_where_the_templates_own_mark_is_another() -> None:
    other_end = tokenizer(eos="</s>", chat_template=CHATML)
    for template in ("tokenizer", "chatml"):
        written = spelled(one(CONVERSATION, template, other_end), other_end)
        assert written.count("</s>") == 1
        assert written.startswith("<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n[b<|im_end|>")
    assert spelled(one(CONVERSATION, "chatml", other_end), other_end).endswith("[d<|im_end|></s>]")


def test_a_template_that_rewrites_earlier_turns_trains_the_last_answer_and_says_so() -> None:
    # As the templates of reasoning models: only the last answer keeps its thoughts.
    rewriting = CHATML.replace(
        "{{ m.content }}", "{% if loop.last and m.role == 'assistant' %}<think>{% endif %}{{ m.content }}"
    )
    tally = Tally()
    encoded = one(CONVERSATION, "tokenizer", tokenizer(eos="<|im_end|>", chat_template=rewriting), tally=tally)
    assert spelled(encoded).endswith(
        "assistant\nb<|im_end|>\n<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n[<think>d<|im_end|>]"
    )
    assert spelled(encoded).count("[") == 1
    assert (tally.encoded, tally.rewritten) == (1, 1)


def test_a_template_that_does_not_put_the_answer_after_its_prompt_is_refused() -> None:
    odd = tokenizer(
        chat_template=CHATML.replace("{% if add_generation_prompt %}<|im_start|>", "{% if add_generation_prompt %}>")
    )
    with pytest.raises(PlanInvalid, match="does not write an answer right after its prompt"):
        one(CONVERSATION, "tokenizer", odd)


def test_a_conversation_that_the_template_refuses_is_named_and_not_quoted() -> None:
    strict = tokenizer(
        chat_template="{% if messages[0].role == 'system' %}"
        "{{ raise_exception('no ' + messages[0].content) }}{% endif %}" + CHATML
    )
    with pytest.raises(DataInvalid, match=r"rows\.jsonl, line 4: the model's chat template refuses") as caught:
        one(example(("system", "Jane Doe"), ("assistant", "b")), "tokenizer", strict)
    assert "Jane" not in str(caught.value)
    assert caught.value.__suppress_context__


def test_a_tokenizer_without_a_chat_template_is_refused() -> None:
    with pytest.raises(PlanInvalid, match="no chat template") as caught:
        one(CONVERSATION, "tokenizer")
    assert "alpaca" in caught.value.cure


def test_long_examples_lose_their_end() -> None:
    row = example(("user", "abc"), ("assistant", "qrstuv"))
    whole, tally = one(row, "plain"), Tally()
    assert len(whole) == 4 + 6 + 1
    cut = one(row, "plain", max_length=7, tally=tally)
    assert spelled(cut) == "abc\n[qrs]"
    assert (tally.truncated, tally.encoded, cut.reference) == (1, 1, "qrstuv")
    one(row, "plain", max_length=len(whole), tally=tally)
    assert (tally.truncated, tally.encoded) == (1, 2)


def test_the_last_prompt_cut_off_leaves_earlier_answers_but_nothing_to_match() -> None:
    row = example(("user", "a"), ("assistant", "b"), ("user", "cccccccccc"), ("assistant", "d"))
    encoded = one(row, "plain", max_length=8)
    assert spelled(encoded) == "a\n[b</s>]\nccc"
    assert (encoded.prompt_tokens, encoded.reference) == (0, None)


def test_rows_without_a_trained_answer_token_are_counted_and_left_out() -> None:
    tally = Tally()
    rows = [
        example(("user", "abcdefgh"), ("assistant", "x")),  # the prompt, 9 tokens, fills all 9
        example(("user", "abcdefg"), ("assistant", "x")),  # one answer token is left
        example(("user", "a"), ("assistant", " \n")),
        example(("user", "a")),
        example(("assistant", "q"), format_="text"),
        example(("assistant", ""), format_="text"),
    ]
    encoded = encode(rows, tokenizer=TOKENIZER, template="plain", max_length=9, tally=tally)
    assert [spelled(e) for e in encoded] == ["abcdefg\n[x]", "q[</s>]"]
    assert (tally.cut_off, tally.without_answer, tally.skipped, tally.encoded, tally.truncated) == (1, 3, 4, 2, 1)


def test_order_is_kept_over_many_calls_of_the_tokenizer() -> None:
    rows = [example(("user", f"{n}"), ("assistant", f"{n + 1}")) for n in range(1100)]
    rows[600] = example(("user", "no answer"))
    advanced: list[int] = []
    encoded = encode(
        rows, tokenizer=TOKENIZER, template="plain", max_length=64, tally=Tally(), progress=advanced.append
    )
    assert [e.reference for e in encoded] == [f"{n + 1}" for n in range(1100) if n != 600]
    for e in encoded[::100]:
        assert spelled(e) == f"{int(e.reference or '') - 1}\n[{e.reference}</s>]"
    assert sum(advanced) == 1100
    assert len(advanced) > 1


def plan(**data: object) -> Plan:
    return Plan.model_validate({"name": "t", "model": {"name": "m"}, "seed": 5, "data": {"template": "brief", **data}})


def write(path: Path, count: int) -> Path:
    rows = [{"instruction": f"q{n}", "output": f"a{n}"} for n in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def answers(side: list[Encoded]) -> set[str | None]:
    return {encoded.reference for encoded in side}


def test_a_sites_data_in_one_call(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", 300)
    with path.open("a") as stream:
        stream.write(json.dumps({"instruction": "none", "output": ""}) + "\n")
        stream.write(json.dumps({"instruction": "x" * 200, "output": "far"}) + "\n")
        stream.write(json.dumps({"instruction": "long", "output": "y" * 200}) + "\n")
    seen: list[tuple[int, int]] = []
    site = load_site_data(
        path,
        plan(validation_fraction=0.2, validation_limit=30, max_length=64),
        TOKENIZER,
        "site",
        lambda done, total: seen.append((done, total)),
    )
    assert len(site.validation) == 30
    assert not answers(site.train) & answers(site.validation)
    counts = site.counts
    assert counts["rows"] == 303
    assert counts["train_rows"] == len(site.train)
    assert counts["train_rows"] + counts["validation_rows"] + counts["held_out_rows"] + counts["skipped_rows"] == 303
    assert 10 < counts["held_out_rows"] < 60
    assert (counts["skipped_rows"], counts["truncated_rows"]) == (2, 1)
    assert [note.split(" ")[0] for note in site.notes] == ["1", "1", "1", str(counts["held_out_rows"])]
    assert seen[-1] == (303 - counts["held_out_rows"],) * 2
    again = load_site_data(path, plan(validation_fraction=0.2, validation_limit=30, max_length=64), TOKENIZER, "site")
    assert all(np.array_equal(a.input_ids, b.input_ids) for a, b in zip(site.validation, again.validation, strict=True))


def test_an_evaluator_measures_with_every_row(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", 40)
    evaluator = load_site_data(path, plan(validation_limit=5), TOKENIZER, "evaluator")
    assert evaluator.train == []
    assert answers(evaluator.validation) == {f"a{n}" for n in range(40)}
    assert [e.reference for e in evaluator.validation] != [f"a{n}" for n in range(40)]  # a first part is a fair sample


def test_data_of_which_nothing_is_left_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", 20)
    with pytest.raises(DataInvalid, match=r"of 20 rows none is left to train on.*max_length = 4 tokens") as caught:
        load_site_data(path, plan(max_length=4), TOKENIZER, "site")
    assert "max_length" in caught.value.cure
    with pytest.raises(DataInvalid, match="none is left to measure with"):
        load_site_data(path, plan(max_length=4), TOKENIZER, "evaluator")


def test_a_site_without_validation_rows_is_told(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", 2)
    site = load_site_data(path, plan(validation_fraction=0.001), TOKENIZER, "site")
    assert len(site.train) == 2
    assert any("no validation loss" in note for note in site.notes)
    assert load_site_data(path, plan(validation_fraction=0), TOKENIZER, "site").notes == ()


def test_an_unknown_template_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(PlanInvalid, match="vicuna"):
        load_site_data(tmp_path / "absent", plan(template="vicuna"), TOKENIZER, "site")
