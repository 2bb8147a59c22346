"""A study's file, its space in the base plan, and what it would cost."""

import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from tune_harness import PLAN, STUDY, write_study

from fsllm_common.accounting.budget import epsilon_of
from fsllm_common.errors import Exit, PlanInvalid
from fsllm_operator.cli import main
from fsllm_operator.plan_report import report
from fsllm_operator.tune.cost import cost
from fsllm_operator.tune.space import MOST_CORNERS, Space, corners, rungs
from fsllm_operator.tune.study import Choices, Objective, Range, Study, study_from_file


def tune(*arguments: str | Path) -> Result:
    result = CliRunner().invoke(main, ["tune", *map(str, arguments)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("low: 1.0e-4", "low: 1.0e-1", "space.train.learning_rate: low (0.1) must be less than high (0.01)"),
        ("low: 1.0e-4", "low: 0", "with log, low must be more than 0"),
        ("log: true", "log: true, step: 1.0e-4", "log and step do not go together"),
        ("log: true", "step: 7.0e-3", "no whole number of steps"),
        ("log: true", "step: 1.0e-300", "no whole number of steps of 1e-300"),
        ("low: 1.0e-4", "low: true", "space.train.learning_rate.low: input should be a valid number"),
        ("log: true", "lgo: true", "space.train.learning_rate.lgo: unknown key"),
        ("[4, 8]", "[4]", "space.adapter.rank.choices: tuple should have at least 2 items"),
        ("[4, 8]", "[4, 4]", "a choice is given twice"),
        ("adapter.rank", "evaluate.limit", "evaluate.limit can not be searched"),
        ("adapter.rank", "train", "train and train.learning_rate overlap"),
        ("name: unit", "name: Unit", "name: string should match pattern"),
        ("name: unit", "name: unit\nmethod: grid", "method: input should be 'random', 'halving' or 'tpe'"),
        ("adapter.rank", "rounds", "rounds can not be searched with halving"),
    ],
)
def test_a_wrong_study_is_refused_with_its_key(tmp_path: Path, old: str, new: str, words: str) -> None:
    path = write_study(tmp_path, study=STUDY.replace(old, new) + ("method: halving\n" if "rounds" in new else ""))
    with pytest.raises(PlanInvalid, match=r"docs/tune\.md") as caught:
        study_from_file(path)
    assert words in caught.value.message


def test_a_file_that_is_no_study_is_told_of_as_a_study(tmp_path: Path) -> None:
    (tmp_path / "study.txt").write_text(STUDY)
    with pytest.raises(PlanInvalid, match=r"a study's file name ends in \.yaml"):
        study_from_file(tmp_path / "study.txt")
    with pytest.raises(PlanInvalid) as caught:
        study_from_file(tmp_path / "none.yaml")
    assert caught.value.cure == "Give the path of a study file that you may read."
    with pytest.raises(PlanInvalid, match="not YAML") as caught:
        study_from_file(write_study(tmp_path, study="name: [\n"))
    assert "fsllm tune" in caught.value.cure
    assert "plan check" not in caught.value.cure
    with pytest.raises(PlanInvalid, match="null byte"):
        Space.read(write_study(tmp_path, study=STUDY.replace("plan.yaml", '"plan\\0.yaml"')))


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (
            "low: 1.0e-4",
            "low: -1.0",
            "with train.learning_rate -1, adapter.rank 4: train.learning_rate: input should be",
        ),
        ("[4, 8]", "[8, 0]", "with train.learning_rate 0.0001, adapter.rank 0: adapter.rank: input should be greater"),
        ("adapter.rank", "adapter.rnak", "adapter.rnak: unknown key; did you mean 'rank'"),
        ("adapter.rank", "rounds.of", "rounds.of: this key is not inside a section"),
        ("adapter.rank", "pipeline.0.norm", "pipeline.0: the base plan's list has no such item"),
        ("plan.yaml\n", "plan.yaml\nobjective: {metric: exact_match}\n", "measures loss, perplexity, not exact_match"),
        (
            "  adapter.rank: {choices: [4, 8]}",
            "  algorithm.name: {choices: [fedavg, fedsa-lora]}\nobjective: {whose: evaluators}",
            "with algorithm.name fedsa-lora each site has a model of its own",
        ),
        ("plan.yaml\n", "plan.yaml\nmethod: halving\nhalving: {min_rounds: 4}\n", "never compared before they end"),
    ],
)
def test_a_space_whose_corners_make_refused_plans_is_refused(tmp_path: Path, old: str, new: str, words: str) -> None:
    study = STUDY.replace(old, new).replace(", log: true", "" if "-1" in new else ", log: true")
    path = write_study(tmp_path, study=study, plan=PLAN + "pipeline: []\n")
    with pytest.raises(PlanInvalid) as caught:
        Space.read(path)
    assert words in caught.value.message


def test_values_go_where_their_keys_say_and_the_rest_stays(tmp_path: Path) -> None:
    plan = PLAN + "pipeline: [{stage: clip, norm: 1.0}]\n"
    study = """
name: deep
plan: plan.yaml
space:
  pipeline.0.norm: {low: 0.5, high: 2.0}
  adapter.targets: {choices: [all-linear, [q_proj, v_proj]]}
  algorithm: {choices: [{name: fedavg}, {name: fedprox, parameters: {mu: 0.1}}]}
"""
    space = Space.read(write_study(tmp_path, study=study, plan=plan))
    values = {"pipeline.0.norm": 0.5, "adapter.targets": ["q_proj"], "algorithm": {"name": "fedprox"}}
    made = space.plan_with("deep-0", values)
    assert made.model_dump()["pipeline"][0]["norm"] == 0.5
    assert made.adapter.targets == ("q_proj",)
    assert made.algorithm.name == "fedprox"
    assert (made.name, made.train.learning_rate, made.adapter.rank) == ("deep-0", 1e-3, 8)
    assert "adapter" not in space.base
    assert space.base["pipeline"][0]["norm"] == 1.0


def test_numbers_are_whole_where_both_ends_are_written_so(tmp_path: Path) -> None:
    assert Range(low=1, high=4).whole
    assert not Range(low=1, high=4.0).whole
    assert not Range(low=1.0, high=4, step=0.5).whole
    # YAML takes 1e-4 for a word.
    study = study_from_file(write_study(tmp_path, study=STUDY.replace("1.0e-4", "1e-4").replace("[4, 8]", "[1e-4, x]")))
    assert study.space["train.learning_rate"] == Range(low=1e-4, high=1e-2, log=True)
    assert study.space["adapter.rank"] == Choices(choices=(1e-4, "x"))


def test_corners_are_all_combinations_or_each_end_twice() -> None:
    few = {"a": Range(low=1, high=3), "b": Choices(choices=("x", "y", "z"))}
    found = [tuple(values.values()) for values in corners(few)]
    assert sorted(found) == [(1, "x"), (1, "y"), (1, "z"), (3, "x"), (3, "y"), (3, "z")]
    many = {f"k{at}": Range(low=0, high=1) for at in range(20)}
    found = [tuple(values.values()) for values in corners(many)]
    assert len(found) == 80 < MOST_CORNERS
    for at in range(20):
        assert {values[at] for values in found} == {0, 1}


@pytest.mark.parametrize(
    ("least", "factor", "rounds", "expected"),
    [(1, 3, 27, (1, 3, 9)), (1, 3, 28, (1, 3, 9, 27)), (2, 2, 10, (2, 4, 8)), (1, 4, 4, (1,)), (5, 3, 5, ())],
)
def test_rungs(least: int, factor: int, rounds: int, expected: tuple[int, ...]) -> None:
    assert rungs(least, factor, rounds) == expected


def test_the_cost_is_the_dearest_corners(tmp_path: Path) -> None:
    plan = (
        PLAN
        + "pipeline: [{stage: clip, norm: 1.0}, {stage: noise, multiplier: 2.0, delta: 1.0e-6}]\n"
        + "algorithm: {weighting: uniform}\n"
    )
    study = STUDY + "  pipeline.1.multiplier: {low: 4.0, high: 8.0}\n  rounds: {choices: [2, 6]}\ntrials: 7\n"
    space = Space.read(write_study(tmp_path, study=study, plan=plan))
    found = cost(space)
    assert found.rounds == 7 * 6
    # All trials' releases add up: 7 times 6 of the least noise.
    assert found.epsilon == pytest.approx(epsilon_of(4.0, 42, 1e-6))
    each = report(space.plan_with("x", {"adapter.rank": 8, "rounds": 6}))
    assert each.bytes_down is not None
    assert each.bytes_up is not None
    assert found.bytes_per_site == 7 * 6 * (each.bytes_down + each.bytes_up)
    told = dict(found.rows())
    assert told["train.learning_rate"] == "0.0001 to 0.01, evenly by its logarithm"
    assert "at most 42 rounds: 7 trials" in told["cost"]


class TestCommand:
    """What needs no server."""

    def test_check(self, tmp_path: Path) -> None:
        path = write_study(tmp_path, "method: halving\ntrials: 9\n")
        result = tune(path, "--check")
        assert result.exit_code == 0, result.stderr
        assert "after rounds 1, 3 only the best of each 3 go on" in result.stdout
        told = json.loads(tune(path, "--check", "--json").stdout)
        assert (told["valid"], told["rounds"], told["rungs"], told["epsilon"]) == (True, 36, [1, 3], None)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["plan.yaml", "study.yaml"]

    def test_check_of_a_wrong_one(self, tmp_path: Path) -> None:
        path = write_study(tmp_path, study=STUDY.replace("[4, 8]", "[0, 8]"))
        result = tune(path, "--check")
        assert (result.exit_code, result.stdout) == (Exit.CONFIGURATION, "")
        assert "adapter.rank 0: adapter.rank: input should be greater than 0" in result.stderr
        told = json.loads(tune(path, "--check", "--json").stdout)
        assert (told["valid"], told["reason"]) == (False, "PLAN_INVALID")

    def test_nothing_to_show_yet(self, tmp_path: Path) -> None:
        result = tune(write_study(tmp_path), "--show")
        assert (result.exit_code, "No trials yet" in result.stdout) == (0, True)
        assert not (tmp_path / "study.db").exists()

    def test_both_at_once(self, tmp_path: Path) -> None:
        assert tune(write_study(tmp_path), "--show", "--check").exit_code == Exit.USAGE


def test_the_documented_study_fits_the_demos_plan(tmp_path: Path) -> None:
    from fsllm_bench.demo import plans

    page = (Path(__file__).parents[2] / "docs" / "tune.md").read_text(encoding="utf-8")
    example = re.search(r"```yaml\n(# study\.yaml.*?)```", page, re.DOTALL)
    assert example is not None
    (tmp_path / "study.yaml").write_text(example[1])
    plans.write(tmp_path / "plans", "embedded", 0, rounds=None, steps=None, fields={}, normalizer=None)
    space = Space.read(tmp_path / "study.yaml")
    assert cost(space).rounds == 12 * 6
    keys = [*Study.model_fields, *(f"objective.{key}" for key in Objective.model_fields)]
    keys.remove("objective")
    assert [key for key in keys if f"`{key}`" not in page] == []
