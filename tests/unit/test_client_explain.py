"""`fsllm-client explain`: to the byte what leaves, and whether the policy accepts it."""

import json
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from fsllm_client.cli import main
from fsllm_client.site.explain import Explanation, explain, lines
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


def test_the_longest_run_of_many_tensors_is_added_up_at_once() -> None:
    """Tensor by tensor and round by round it would be 200 million sums."""
    algorithm = {"name": "noop", "synthetic": {"tensors": 2000, "mebibytes": 1}}
    began = time.process_time()
    found = explain(plan(rounds=99_999, model={"name": "synthetic"}, algorithm=algorithm), Policy(), "site", BARE)
    assert found.bytes_in_all == 99_999 * found.bytes_per_round
    assert time.process_time() - began < 5


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


def test_an_evaluator_whose_update_the_others_are_compared_with_is_told_and_asked_as_a_site(tmp_path: Path) -> None:
    trusted = plan(algorithm={"name": "fltrust"}, pipeline=NOISE)
    own = policy(tmp_path, a_model(tmp_path), "[data]\ntrain = false\n[privacy]\nmaximum_epsilon_per_run = 0.1")
    found = explain(trusted, own, "evaluator", BARE)
    assert [refusal.split(" = ")[0].rpartition(" ")[2] for refusal in found.refusals] == [
        "data.train",
        "privacy.maximum_epsilon_per_run",
    ]
    assert "Upload" in found.messages
    assert "Upload of version 0" not in found.messages
    assert found.counts == ["steps"]
    assert found.epsilon == pytest.approx(epsilon_of(2.0, 4, 1e-5))
    assert "clipped and noised here" in found.privacy
    assert "torch not installed" in found.tensors_unknown


def test_a_rank_that_the_policy_refuses_is_told(tmp_path: Path) -> None:
    own = policy(tmp_path, a_model(tmp_path), "[accept]\nmaximum_rank = 4")
    for adapter in ({"rank": 8}, {"rank": 8, "ranks": [6]}):
        found = explain(plan(algorithm={"name": "flora"}, adapter=adapter), own, "site", WHOLE)
        assert any("accept.maximum_rank = 4; the plan has" in refusal for refusal in found.refusals)


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


@pytest.mark.slow
def test_only_what_a_method_sends_is_listed(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Each listing starts a process that imports torch: one is enough, for they are all of the same adapter.
    shapes = adapter_shapes(plan(adapter={"rank": 4}), tiny_model)

    def of_rank_four(asked: Plan, folder: Path) -> dict[str, tuple[int, ...]]:
        assert (asked.adapter.rank, folder) == (4, tiny_model)
        return shapes

    monkeypatch.setattr("fsllm_client.site.explain.adapter_shapes", of_rank_four)

    def explained(name: str, **keys: object) -> Explanation:
        text = "[accept]\nmaximum_rank = 4\n"
        asked = plan(algorithm={"name": name}, wire={"element_type": "fp32"}, **keys)
        return explain(asked, policy(tmp_path, tiny_model, text), "site", WHOLE)

    whole = explained("fedavg", adapter={"rank": 4})
    a, b = (sum(line.bytes for line in whole.tensors if line.role == f"lora_{key}") for key in "ab")
    assert whole.bytes_in_all == 4 * (a + b)
    frozen = explained("ffa-lora", adapter={"rank": 4})
    assert {line.role for line in frozen.tensors} == {"lora_b"}
    assert (frozen.bytes_per_round, frozen.bytes_in_all, frozen.kept) == (b, 4 * b, [])
    turns = explained("rolora", adapter={"rank": 4})
    assert (turns.bytes_per_round, turns.bytes_in_all) == (max(a, b), 2 * a + 2 * b)
    assert any("in 2 of 4 rounds" in line for line in lines(turns))
    private = explained("fedsa-lora", adapter={"rank": 4})
    assert {line.role for line in private.tensors} == {"lora_a"}
    assert len(private.kept) == len(private.tensors)
    controlled = explained("scaffold", adapter={"rank": 4}, cohort={"sites": ["a", "b"]})
    assert controlled.bytes_per_round == 2 * (a + b)
    # The rank is the site's own.
    smaller = explained("flexlora", adapter={"rank": 8, "ranks": [4]})
    assert smaller.bytes_in_all == whole.bytes_in_all


def test_the_command_prints_json(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({"name": "p", "model": {"name": "synthetic"}, "algorithm": {"name": "noop"}}))
    done = CliRunner().invoke(main, ["explain", str(path), "--state-dir", str(tmp_path / "state"), "--json"])
    assert done.exit_code == 0, done.output
    answer = json.loads(done.stdout)
    assert answer["accepted"]
    assert answer["bytes_per_round"] == sum(line["bytes"] for line in answer["tensors"])
