"""What the demo does with a user's file, and how it reads results; the demo itself is run by `make demo`."""

import json
from pathlib import Path

import pytest
import yaml

from fsllm_bench.demo import data, plans, results
from fsllm_common.errors import DataInvalid
from fsllm_common.plan import plan_from_file


def rows(path: Path, count: int) -> Path:
    path.write_text(
        "".join(json.dumps({"instruction": f"i{n}", "output": "o", "kind": n % 7}) + "\n" for n in range(count))
    )
    return path


def lines(path: Path) -> set[str]:
    return set(path.read_text().splitlines())


def test_every_row_goes_to_one_place(tmp_path: Path) -> None:
    source = rows(tmp_path / "rows.jsonl", 100)
    files = data.divide(source, tmp_path / "out", 3, None)
    parts = [*files.sites.values(), files.held_out]
    assert sum(len(lines(part)) for part in parts) == 100
    assert set().union(*(lines(part) for part in parts)) == lines(source)
    assert lines(files.pooled) == set().union(*(lines(part) for part in files.sites.values()))
    assert len(lines(files.held_out)) == 10


def test_rows_of_one_value_stay_together(tmp_path: Path) -> None:
    files = data.divide(rows(tmp_path / "rows.jsonl", 210), tmp_path / "out", 0, "kind")
    kinds = [{json.loads(line)["kind"] for line in lines(path)} for path in files.sites.values()]
    assert sorted(len(kind) for kind in kinds) == [2, 2, 3]
    assert set.union(*kinds) == set(range(7))


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ('{"kind": 1}\nsecret text\n' * 20, "line 2: not JSON"),
        ("[1]\n" * 40, "line 1: not a JSON object"),
        ('{"a": 1}\n' * 40, "line 1: has no field 'kind'"),
        ('{"kind": 1}\n' * 40, "1 different values"),
        ('{"kind": 1}\n', "1 rows are too few"),
    ],
)
def test_a_file_that_can_not_be_divided_says_where(tmp_path: Path, text: str, what: str) -> None:
    source = tmp_path / "rows.jsonl"
    source.write_text(text)
    with pytest.raises(DataInvalid, match=what) as refused:
        data.divide(source, tmp_path / "out", 0, "kind")
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize("model", ["embedded", "smollm2"])
def test_the_plans_are_valid_and_compare_like_with_like(tmp_path: Path, model: str) -> None:
    written = plans.write(tmp_path, model, 1, rounds=None, steps=4, fields={}, normalizer=None)
    together, pooled = plan_from_file(written.federation), plan_from_file(written.pooled)
    alone = [plan_from_file(path) for path in written.alone.values()]
    assert together.cohort.sites == data.SITES
    assert [plan.cohort.sites for plan in alone] == [(site,) for site in data.SITES]
    assert {plan.train.steps for plan in (together, *alone)} == {4}
    assert pooled.train.steps == 4 * len(data.SITES)
    assert {plan.rounds for plan in (together, pooled, *alone)} == {together.rounds}
    assert yaml.safe_load(written.federation.read_text())["seed"] == 1


def test_the_held_out_numbers_are_the_evaluators(tmp_path: Path) -> None:
    def metrics(member: str, loss: float) -> dict[str, object]:
        values = {"loss": loss, "exact_match": loss / 10}
        return {"member": member, "metrics": [{"name": name, "value": value} for name, value in values.items()]}

    run = {
        "commits": [
            {"round": 0, "metrics": [metrics("hospital-a", 9.0), metrics("evaluator", 4.0)]},
            {"round": 1, "metrics": []},
            {"round": 2, "metrics": [metrics("evaluator", 2.0)]},
        ]
    }
    series = results.held_out(run, "evaluator")
    assert series == [(0, 4.0, 0.4), (2, 2.0, 0.2)]
    table = [results.Result("base model", 4.0, 0.4), results.Result("federation", 2.0, 0.2)]
    picture = results.write(tmp_path, table, series)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "results.json").read_text())["results"][1]["loss"] == 2.0
