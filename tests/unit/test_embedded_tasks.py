"""The embedded data say what they claim, and the embedded model loads and fits in the package."""

import json
from collections import Counter
from pathlib import Path

import pytest

from fsllm_bench.embedded import corpus, lexicon, model_path, tasks

TASK_NAMES = [task.name for task in tasks.TASKS]
FACTS = {
    "opposite": {"hot": "cold", "receive": "send", "woman": "man", "cheap": "costly"},
    "category": {"wolf": "animal", "stork": "bird", "violin": "instrument", "needle": "tool"},
    "clinic": {"migraine": "neurology", "skin rash": "dermatology", "valve leak": "cardiology"},
    "plural": {
        "cat": "cats", "city": "cities", "key": "keys", "box": "boxes", "tooth": "teeth",
        "knife": "knives", "potato": "potatoes", "piano": "pianos", "goose": "geese",
    },
}  # fmt: skip


def recomputed(task: str, asked: str) -> str:
    """Answer the tasks that can be computed, by other means than the generator's."""
    match task:
        case "last_letter":
            return list(asked).pop()
        case "backwards":
            return " ".join(asked[len(asked) - 1 - place] for place in range(len(asked)))
        case "addition":
            return str(sum(int(part) for part in asked.split("+")))
        case "next_number":
            first, second, third = map(int, asked.split())
            assert third - second == second - first
            return str(2 * third - second)
        case "largest":
            return sorted(asked.split(), key=int)[-1]
        case _:
            raise ValueError(task)


def keys(rows: tuple[tasks.Row, ...]) -> set[tuple[str, str]]:
    return {(row["task"], row["input"]) for row in rows}


@pytest.mark.parametrize("name", ["last_letter", "backwards", "addition", "next_number", "largest"])
def test_computed_answers_are_right(name: str) -> None:
    task = next(task for task in tasks.TASKS if task.name == name)

    wrong = [(asked, answer) for asked, answer in task.pairs() if recomputed(name, asked) != answer]

    assert wrong == []


@pytest.mark.parametrize("name", FACTS)
def test_known_answers_are_right(name: str) -> None:
    pairs = dict(next(task for task in tasks.TASKS if task.name == name).pairs())

    assert {asked: pairs[asked] for asked in FACTS[name]} == FACTS[name]


@pytest.mark.parametrize("task", tasks.TASKS, ids=TASK_NAMES)
def test_a_task_asks_each_thing_once_and_has_enough_of_them(task: tasks.Task) -> None:
    asked = [asked for asked, _ in task.pairs()]

    assert len(set(asked)) == len(asked) >= tasks.HELDOUT_PER_TASK + tasks.VALIDATION_PER_TASK + 40
    assert len(set(task.instructions)) == len(task.instructions) >= 2


def test_an_opposite_is_mutual() -> None:
    words = [word for pair in lexicon.OPPOSITES for word in pair]

    assert len(set(words)) == len(words)


def test_a_thing_has_one_category_and_a_complaint_one_clinic() -> None:
    for table, index in ((lexicon.CATEGORIES, lexicon.category_of), (lexicon.CLINICS, lexicon.clinic_of)):
        assert sum(map(len, table.values())) == len(index)


def test_the_same_seed_gives_the_same_files_and_another_seed_others(tmp_path: Path) -> None:
    written = [tasks.write_federation(tmp_path / name, seed) for name, seed in (("a", 3), ("b", 3), ("c", 4))]

    texts = [[path.read_text() for path in (*files.train.values(), files.heldout)] for files in written]

    assert texts[0] == texts[1]
    assert all(one != other for one, other in zip(texts[0], texts[2], strict=True))


def read(path: Path) -> list[object]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_written_rows_are_the_rows_made(tmp_path: Path) -> None:
    files = tasks.write_federation(tmp_path / "new" / "folder", 1)
    made = tasks.make_federation(1)

    assert {site: read(path) for site, path in files.train.items()} == {
        site: list(rows) for site, rows in made.train.items()
    }
    assert read(files.heldout) == list(made.heldout)
    assert read(files.validation) == list(made.validation)


@pytest.mark.parametrize("seed", range(5))
def test_no_input_is_on_two_sides_of_a_split(seed: int) -> None:
    made = tasks.make_federation(seed)
    trained = set().union(*(keys(rows) for rows in made.train.values()))

    assert not trained & keys(made.heldout)
    assert not trained & keys(made.validation)
    assert not keys(made.validation) & keys(made.heldout)


def test_the_common_sets_are_balanced_over_all_tasks() -> None:
    made = tasks.make_federation(0)

    assert Counter(row["task"] for row in made.heldout) == dict.fromkeys(TASK_NAMES, tasks.HELDOUT_PER_TASK)
    assert Counter(row["task"] for row in made.validation) == dict.fromkeys(TASK_NAMES, tasks.VALIDATION_PER_TASK)


def test_a_site_holds_mostly_its_own_tasks_and_a_little_of_every_other() -> None:
    made = tasks.make_federation(0)

    for site, own in tasks.own_tasks().items():
        rows = made.train[site]
        counts = Counter(row["task"] for row in rows)
        mine = sum(counts[task.name] for task in own)
        assert len(rows) == tasks.ROWS_PER_SITE
        assert mine == len(rows) - round(len(rows) * tasks.OTHERS_SHARE)
        assert set(counts) == set(TASK_NAMES)


def test_a_site_has_no_row_twice() -> None:
    for rows in tasks.make_federation(0).train.values():
        assert len({(row["instruction"], row["input"]) for row in rows}) == len(rows)


@pytest.mark.parametrize("count", [1, 2, 4, 9])
def test_every_task_is_the_own_task_of_one_site(count: int) -> None:
    dealt = tasks.own_tasks([f"site-{index}" for index in range(count)])

    assert [task for own in dealt.values() for task in own] == list(tasks.TASKS)
    assert max(map(len, dealt.values())) - min(map(len, dealt.values())) <= 1


@pytest.mark.parametrize("sites", [[], ["a", "a"], [str(index) for index in range(10)]])
def test_sites_that_cannot_be_served_are_refused(sites: list[str]) -> None:
    with pytest.raises(ValueError, match="different sites"):
        tasks.own_tasks(sites)


def test_more_rows_than_there_are_is_refused() -> None:
    with pytest.raises(ValueError, match="exist"):
        tasks.make_federation(0, rows_per_site=5000)


def test_a_share_that_is_no_part_is_refused() -> None:
    with pytest.raises(ValueError, match="part of one"):
        tasks.make_federation(0, others_share=1.5)


def test_the_corpus_is_deterministic_and_solves_no_prompt() -> None:
    documents = list(corpus.documents(0, 3000))
    instructions = [instruction for task in tasks.TASKS for instruction in task.instructions]

    assert documents == list(corpus.documents(0, 3000))
    for document in documents:
        assert not ("### Instruction" in document and "### Response" in document)
        assert not any(instruction in document for instruction in instructions)


def test_the_model_fits_in_the_package() -> None:
    sizes = {path.name: path.stat().st_size for path in model_path().iterdir()}

    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "README.md"} <= set(sizes)
    assert sum(sizes.values()) <= 4_000_000


@pytest.mark.slow
def test_the_model_loads_and_tells_a_fact() -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(model_path(), dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_path())

    tokens = tokenizer("hot and cold are", return_tensors="pt")
    told = model.generate(**tokens, max_new_tokens=2, do_sample=False)

    assert tokenizer.decode(told[0], skip_special_tokens=True).startswith("hot and cold are opposites")
    assert 1_000_000 <= sum(weight.numel() for weight in model.parameters()) <= 2_000_000
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<s>", "</s>", "<pad>")
    assert model.config.max_position_embeddings >= 256


@pytest.mark.slow
def test_a_prompt_costs_few_tokens_and_comes_back_as_it_was() -> None:
    tokenizer = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(model_path())

    for row in tasks.make_federation(0).heldout:
        prompt = f"### Instruction:\n{row['instruction']}\n{row['input']}\n### Response:\n"
        assert len(tokenizer(prompt)["input_ids"]) <= 32
        assert len(tokenizer(row["output"])["input_ids"]) <= 7
        assert tokenizer.decode(tokenizer(prompt)["input_ids"]) == prompt
