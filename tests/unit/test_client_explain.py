"""`fsllm-client explain`: to the byte what leaves, and whether the policy accepts it."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from fsllm_client.cli import main
from fsllm_client.site.explain import explain, lines
from fsllm_client.site.machine import Machine
from fsllm_client.site.policy import Policy
from fsllm_client.site.shapes import adapter_shapes
from fsllm_common.accounting.budget import epsilon_of
from fsllm_common.errors import ModelUnusable
from fsllm_common.plan import Plan

NOISE = [{"stage": "clip", "norm": 0.5}, {"stage": "noise", "multiplier": 2.0, "delta": 1e-5}]
BARE = Machine(0, (), 0, 1 << 30, missing=("torch",))
WHOLE = Machine(0, (), 0, 1 << 30, missing=())


def plan(**keys: object) -> Plan:
    return Plan.model_validate({"name": "p", "rounds": 4, "model": {"name": "m"}, **keys})


def policy(tmp_path: Path, model: Path | str, text: str = "") -> Policy:
    path = tmp_path / "policy.toml"
    path.write_text(f'[models]\nm = "{model}"\n{text}')
    return Policy.read(path)


def a_model(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    return tmp_path / "model"


def test_synthetic_tensors_are_listed_to_the_byte() -> None:
    noop = plan(
        model={"name": "synthetic"},
        algorithm={"name": "noop", "synthetic": {"tensors": 3, "mebibytes": 1}},
        wire={"element_type": "bf16"},
    )
    found = explain(noop, Policy(), "site", BARE)
    assert found.accepted
    assert len(found.tensors) == 3
    assert found.bytes_per_round == 2**19
    assert found.bytes_in_all == 4 * 2**19
    assert found.metrics == []
    assert "reads no data" in found.privacy


def test_without_the_stack_it_says_why_the_tensors_are_missing(tmp_path: Path) -> None:
    found = explain(plan(), policy(tmp_path, a_model(tmp_path)), "site", BARE)
    assert found.accepted
    assert "torch not installed" in found.tensors_unknown


def test_noise_changes_what_leaves(tmp_path: Path) -> None:
    own = policy(tmp_path, a_model(tmp_path))
    free, noised = (explain(plan(pipeline=stages), own, "site", BARE) for stages in ((), NOISE))
    assert free.epsilon is None
    assert free.metrics == ["train_loss", "tokens_per_second", "seconds", "loss", "perplexity"]
    assert free.counts == ["examples", "tokens", "steps"]
    assert "the training loss" in free.messages["Progress"]
    assert noised.epsilon == pytest.approx(epsilon_of(2.0, 4, 1e-5))
    assert set(noised.metrics) == {
        "tokens_per_second",
        "seconds",
        "clip_norm",
        "noise_deviation",
        "epsilon",
        "loss",
        "perplexity",
    }
    assert noised.counts == ["steps"]
    assert "loss" not in noised.messages["Progress"]


def test_every_refusal_is_told(tmp_path: Path) -> None:
    own = policy(tmp_path, "nowhere", "[privacy]\nmaximum_epsilon_per_run = 0.1\n[accept]\nmaximum_rounds = 3")
    found = explain(plan(pipeline=NOISE), own, "site", BARE)
    assert not found.accepted
    told = "\n".join(lines(found))
    for part in (
        "accept.maximum_rounds = 3; the plan has rounds = 4",
        "maximum_epsilon_per_run = 0.1",
        "no config.json",
    ):
        assert part in told
    assert told.startswith("Plan p, 4 rounds, as site\nThis site's policy REFUSES the plan:")


def test_an_evaluator_sends_no_tensors(tmp_path: Path) -> None:
    found = explain(plan(), policy(tmp_path, a_model(tmp_path)), "evaluator", WHOLE)
    assert not found.tensors
    assert "Upload" not in found.messages
    assert found.metrics == ["loss", "perplexity"]


@pytest.mark.slow
def test_real_tensors_are_those_of_the_adapter(tmp_path: Path, tiny_model: Path) -> None:
    lora = plan(adapter={"rank": 3, "targets": ["q_proj", "v_proj"]}, wire={"element_type": "bf16"})
    own = policy(tmp_path, tiny_model)
    found = explain(lora, own, "site", WHOLE)
    # Two layers; hidden 45, three heads and one key-value head of 8.
    expected = {
        ("q_proj.lora_A", 3 * 45),
        ("q_proj.lora_B", 24 * 3),
        ("v_proj.lora_A", 3 * 45),
        ("v_proj.lora_B", 8 * 3),
    }
    assert len(found.tensors) == 2 * len(expected)
    for line in found.tensors:
        (elements,) = [size for name, size in expected if name in line.name]
        assert line.bytes == 2 * elements
    assert found.bytes_per_round == 2 * 2 * sum(size for _, size in expected)
    with pytest.raises(ModelUnusable, match="x_proj"):
        adapter_shapes(plan(adapter={"targets": ["x_proj"]}), tiny_model)


def test_the_command_prints_json(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({"name": "p", "model": {"name": "synthetic"}, "algorithm": {"name": "noop"}}))
    done = CliRunner().invoke(main, ["explain", str(path), "--state-dir", str(tmp_path / "state"), "--json"])
    assert done.exit_code == 0, done.output
    answer = json.loads(done.stdout)
    assert answer["accepted"]
    assert answer["bytes_per_round"] == sum(line["bytes"] for line in answer["tensors"])
