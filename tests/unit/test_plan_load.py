import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from fsllm_common.algorithms import algorithm_class, algorithm_names
from fsllm_common.errors import PlanInvalid
from fsllm_common.plan import Plan, canonical_json, plan_from_file, plan_from_json

MINIMAL: dict[str, Any] = {"name": "trial", "model": {"name": "embedded"}}

FULL: dict[str, Any] = {
    **MINIMAL,
    "rounds": 3,
    "adapter": {"rank": 4, "targets": ["q_proj", "v_proj"]},
    "algorithm": {"name": "fedprox", "parameters": {"mu": 0.02}, "weighting": "uniform"},
    "cohort": {"quorum": 2, "size": 3, "over_selection": 1.5},
    "train": {"steps": 5, "learning_rate": 3e-4},
    "data": {"fields": {"instruction": "q", "output": "a"}, "packing": False},
    "pipeline": [{"stage": "clip", "norm": 1.0}, {"stage": "noise", "multiplier": 0.5}],
}

YAML = """\
name: trial
model: {name: embedded}
rounds: 3
adapter: {rank: 4, targets: [q_proj, v_proj]}
algorithm: {name: fedprox, parameters: {mu: 0.02}, weighting: uniform}
cohort: {quorum: 2, size: 3, over_selection: 1.5}
train:
  steps: 5
  learning_rate: 3e-4   # PyYAML reads this as text: YAML 1.1 wants 3.0e-4
data: {fields: {instruction: q, output: a}, packing: false}
pipeline:
  - {stage: clip, norm: 1.0}
  - {stage: noise, multiplier: 0.5}
"""

TOML = """\
name = "trial"
rounds = 3
[model]
name = "embedded"
[adapter]
rank = 4
targets = ["q_proj", "v_proj"]
[algorithm]
name = "fedprox"
parameters = { mu = 0.02 }
weighting = "uniform"
[cohort]
quorum = 2
size = 3
over_selection = 1.5
[train]
steps = 5
learning_rate = 3e-4
[data]
packing = false
fields = { instruction = "q", output = "a" }
[[pipeline]]
stage = "clip"
norm = 1.0
[[pipeline]]
stage = "noise"
multiplier = 0.5
"""


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def refused(changes: dict[str, Any]) -> str:
    with pytest.raises(PlanInvalid) as caught:
        plan_from_json(json.dumps({**MINIMAL, **changes}).encode())
    return caught.value.message


def test_the_three_notations_give_the_same_plan(tmp_path: Path) -> None:
    expected = plan_from_json(json.dumps(FULL).encode())
    assert expected.train.learning_rate == 3e-4
    for name, text in (("p.yaml", YAML), ("p.yml", YAML), ("p.toml", TOML), ("p.json", json.dumps(FULL))):
        assert plan_from_file(write(tmp_path / name, text)) == expected
    assert plan_from_file(write(tmp_path / "bom.json", "\ufeff" + json.dumps(FULL))) == expected


def test_canonical_json_is_stable_complete_and_reads_back() -> None:
    plan = plan_from_json(json.dumps(FULL).encode())
    text = canonical_json(plan)
    assert plan_from_json(text) == plan
    assert canonical_json(plan_from_json(text)) == text
    shuffled = json.dumps(dict(reversed(FULL.items()))).encode()
    assert canonical_json(plan_from_json(shuffled)) == text
    assert text == json.dumps(json.loads(text), sort_keys=True, separators=(",", ":")).encode()
    assert set(json.loads(text)) == set(Plan.model_fields)
    assert canonical_json(plan_from_json(json.dumps(MINIMAL).encode())) != text


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"roundz": 3}, "roundz: unknown key; did you mean 'rounds'?"),
        ({"zzz": 3}, "zzz: unknown key; known: name, seed, rounds"),
        ({"train": {"lerning_rate": 1}}, "train.lerning_rate: unknown key; did you mean 'learning_rate'?"),
        (
            {"algorithm": {"synthetic": {"tensor": 1}}},
            "algorithm.synthetic.tensor: unknown key; did you mean 'tensors'?",
        ),
        (
            {"pipeline": [{"stage": "clip", "norm": 1, "nrom": 1}]},
            "pipeline[0].nrom: unknown key; did you mean 'norm'?",
        ),
        ({"pipeline": [{"stage": "clip"}]}, "pipeline[0].norm: this key is required"),
        (
            {"pipeline": [{"stage": "clap"}]},
            "pipeline[0]: stage should be 'clip' or 'noise' (got 'clap'); did you mean 'clip'?",
        ),
        ({"pipeline": [{"norm": 1}]}, "pipeline[0]: needs the key 'stage': 'clip' or 'noise'"),
        ({"pipeline": [3]}, "pipeline[0]: should be a section"),
        ({"model": "embedded"}, "model: should be a section with keys of its own (got 'embedded')"),
        ({"model": {}}, "model.name: this key is required"),
        ({"rounds": 0}, "rounds: input should be greater than 0 (got 0)"),
        ({"rounds": "many"}, "rounds: input should be a valid integer"),
        ({"train": {"learning_rate": float("nan")}}, "train.learning_rate: input should be a finite number"),
        ({"adapter": {"kind": "lroa"}}, "(got 'lroa'); did you mean 'lora'?"),
        ({"adapter": {"targets": ["q", 5]}}, "adapter.targets[1]: input should be a valid string (got 5)"),
        ({"data": {"fields": {"answer": "x"}}}, "data.fields.answer: input should be 'instruction'"),
        ({"data": {"fields": {"output": 7}}}, "data.fields.output: input should be a valid string (got 7)"),
        (
            {"rounds": True},
            "rounds: input should be a valid integer, unable to parse string as an integer (got 'true')",
        ),
        ({"train": {"learning_rate": True}}, "train.learning_rate: input should be a valid number"),
        ({"adapter": {"ranks": [4, True]}}, "adapter.ranks[1]: input should be a valid integer"),
        ({"deepspeed": {"zero_stage": True}}, "deepspeed.zero_stage: input should be 1, 2 or 3 (got 'true')"),
        ({"train": {"gradient_checkpointing": "so"}}, "train.gradient_checkpointing: input should be a valid boolean"),
        (
            {"algorithm": {"name": "fedex", "parameters": {"learning_rates": [1, 2]}}},
            "algorithm.parameters.learning_rates: input should be a valid boolean or a valid integer or a valid number "
            "or a valid string (got [1, 2])",
        ),
        (
            {"algorithm": {"name": "fedprox", "parameters": {"muu": 1}}},
            "algorithm.parameters.muu: unknown key; did you mean 'mu'?",
        ),
        (
            {"algorithm": {"name": "norm-bound", "parameters": {"bound": "medain"}}},
            "algorithm.parameters.bound: input should be a valid number, unable to parse string as a number or "
            "'median' or 'running-median' (got 'medain'); did you mean 'median'?",
        ),
        (
            {"algorithm": {"name": "krum", "parameters": {"byzantine": True}}},
            "algorithm.parameters.byzantine: input should be a valid integer",
        ),
        ({"adapter": {"kind": "adalora"}}, "adapter.kind: each site would prune"),
        (
            {"algorithm": {"proximal_mu": 0.1, "parameters": None}},
            "algorithm.parameters: input should be a valid dictionary (got None)",
        ),
        ({"algorithm": {"proximal_mu": 0.1, "parameters": [1]}}, "algorithm.parameters: input should be a valid dict"),
        ({"name": "A Trial"}, "name: string should match pattern"),
        ({"seed": 2**31}, "seed: input should be less than 2147483648"),
    ],
)
def test_an_error_names_the_key_the_value_and_what_is_allowed(changes: dict[str, Any], words: str) -> None:
    assert words in refused(changes)


def test_all_errors_are_told_at_once() -> None:
    message = refused({"rounds": 0, "seed": -1, "trian": {}})
    assert all(word in message for word in ("rounds:", "seed:", "did you mean 'train'"))


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("p.yaml", "name: a\nmodel: {name: b}\nrounds: 1\nrounds: 2\n", "line 4: rounds: this key appears twice"),
        ("p.yaml", "name: a\ntrain:\n  steps: 1\n  steps: 1\n", "line 4: steps: this key appears twice"),
        ("p.yaml", "name: {{ name }}\n", "line 1: a list or a section is no key (an unfilled {{ name }}?)"),
        ("p.yaml", "name: a\n? [a, b]\n: 1\n", "line 2: a list or a section is no key"),
        ("p.yaml", "name: a\nseed: \x07\n", "line 2: not YAML: the character U+0007"),
        ("p.yaml", "name: \0\n", "line 1: not YAML: the character U+0000"),
        ("p.toml", f"seed = {'9' * 5000}\n", "not TOML: Exceeds the limit"),
        ("p.yaml", "name: a\n  model: b\n", "line 2, column 8: not YAML"),
        ("p.yaml", "a: !!python/object/apply:os.system ['true']\n", "not YAML"),
        ("p.yaml", "a: 0o8x\nb: 2026-13-45\n", "not YAML"),
        ("p.yaml", "- a\n", "a plan is a mapping"),
        ("p.yaml", "", "a plan is a mapping"),
        ("p.json", '{"name": "a", "name": "b"}', "name: this key appears twice"),
        ("p.json", "{", "not JSON"),
        ("p.json", "[" * 100_000, "nested too deeply"),
        ("p.toml", "a = \n", "not TOML"),
        ("p.toml", "name = 'a'\nname = 'b'\n", "not TOML"),
    ],
)
def test_a_file_that_can_not_be_parsed_says_where(tmp_path: Path, name: str, text: str, words: str) -> None:
    path = write(tmp_path / name, text)
    with pytest.raises(PlanInvalid) as caught:
        plan_from_file(path)
    assert caught.value.message.startswith(f"{path}: ")
    assert words in caught.value.message


def test_files_that_are_no_plans(tmp_path: Path) -> None:
    with pytest.raises(PlanInvalid, match=r"ends in \.yaml, \.yml, \.toml, \.json"):
        plan_from_file(write(tmp_path / "plan.txt", YAML))
    with pytest.raises(PlanInvalid, match="No such file"):
        plan_from_file(tmp_path / "none.yaml")
    (tmp_path / "folder.yaml").mkdir()
    with pytest.raises(PlanInvalid, match="Is a directory"):
        plan_from_file(tmp_path / "folder.yaml")
    (tmp_path / "latin.yaml").write_bytes("name: é".encode("latin-1"))
    with pytest.raises(PlanInvalid, match="not UTF-8"):
        plan_from_file(tmp_path / "latin.yaml")
    with pytest.raises(PlanInvalid, match="at most"):
        plan_from_file(write(tmp_path / "big.yaml", "#" * 1_100_000))


def test_yaml_aliases_can_not_fill_the_memory(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 30)]
    with pytest.raises(PlanInvalid) as caught:
        plan_from_file(write(tmp_path / "bomb.yaml", "\n".join([*lines, "name: *a29"])))
    assert len(caught.value.message) < 10_000


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from(sorted(Plan.model_fields)), json_values, max_size=6))
def test_any_json_is_a_plan_or_a_clear_error(content: dict[str, Any]) -> None:
    try:
        plan = plan_from_json(json.dumps({**MINIMAL, **content}).encode())
    except PlanInvalid:
        return
    assert plan_from_json(canonical_json(plan)) == plan


@given(st.binary(max_size=50))
def test_any_bytes_are_a_plan_or_a_clear_error(data: bytes) -> None:
    with pytest.raises(PlanInvalid):
        plan_from_json(data)


def test_the_yaml_reader_is_a_safe_one() -> None:
    from fsllm_common.plan.load import _yaml_loader

    assert issubclass(_yaml_loader(), yaml.SafeLoader)


@pytest.mark.parametrize("name", algorithm_names())
def test_a_plan_of_every_method_is_read_back_as_it_was_recorded(name: str) -> None:
    algorithm = algorithm_class(name)
    recorded = Plan.model_validate(
        {
            "name": "p",
            "model": {"name": "m"},
            "algorithm": {"name": name, "parameters": algorithm.parameters_type().model_dump()},
        }
    )
    again = Plan.model_validate(json.loads(canonical_json(recorded)))
    assert again == recorded
    assert algorithm(again).parameters == algorithm.parameters_type()
