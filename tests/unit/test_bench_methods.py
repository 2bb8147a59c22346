"""The table of methods: each has a plan, results are kept and read again, lies are lies, tables name gaps."""

import fcntl
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from fsllm.v1.control_pb2 import Commit, Contribution, MemberMetrics, Run
from fsllm.v1.federation_pb2 import Metric, Version, VersionPart
from fsllm_bench.methods import plans, runs, splits, tables
from fsllm_bench.methods.__main__ import main
from fsllm_bench.methods.attacks import ATTACKS, NONE, lying
from fsllm_bench.methods.plans import Cell
from fsllm_bench.methods.runs import Results, Score, begin
from fsllm_client.site.payloads import encode_delta
from fsllm_common.algorithms import algorithm_names
from fsllm_common.plan import Plan, plan_from_json
from fsllm_common.tensors.arrays import decode, save_arrays


def checked(cell: Cell) -> Plan:
    return plan_from_json(json.dumps(plans.make_plan(cell)).encode())


@pytest.mark.parametrize("method", plans.METHODS)
@pytest.mark.parametrize("attack", [NONE, *ATTACKS])
def test_the_plan_of_each_method_is_sound_and_names_its_attack(method: str, attack: str) -> None:
    plan = checked(Cell(method, "iid", 2, attack))
    assert plan.name.rpartition("--")[2] == attack
    assert plan.seed == 2
    assert plan.evaluate.every == plan.rounds
    assert plan.wire.max_update_norm is None


def test_every_installed_method_is_measured() -> None:
    assert {*plans.algorithms()} | plans.UNMEASURED == {*algorithm_names()}
    assert {*plans.ATTACKED} <= {*plans.METHODS}


def test_the_most_telling_runs_come_first_and_none_twice() -> None:
    methods = ["fedavg", "krum", "fedadam"]
    found = plans.cells(methods, [5, 6], ["skewed", "iid"], ["scaled"])
    assert len(found) == len({*found}) == 3 * 4 + 2 * 2
    assert found[:3] == [Cell(name, "skewed", 5) for name in methods]
    attacked = [Cell(name, "iid", 5, attack) for name in methods[:2] for attack in (NONE, "scaled")]
    assert found[3:7] == attacked
    assert found[7] == Cell("fedadam", "iid", 5)
    assert {cell.seed for cell in found[8:]} == {6}
    assert found[-2:] == [Cell(name, "iid", 6, "scaled") for name in methods[:2]]


def test_both_splits_deal_the_same_rows_and_nobody_trains_on_what_is_held_out(tmp_path: Path) -> None:
    def rows(path: Path) -> list[dict[str, str]]:
        return [json.loads(line) for line in path.read_text().splitlines()]

    def content(path: Path) -> Counter[tuple[str, ...]]:
        return Counter((row["instruction"], row["input"], row["output"]) for row in rows(path))

    skewed, iid = (splits.write(tmp_path / split, split, 4) for split in ("skewed", "iid"))
    dealt = [sum((content(files.sites[site]) for site in splits.SITES), Counter()) for files in (skewed, iid)]
    assert dealt[0] == dealt[1]
    for site in splits.SITES:
        own = Counter(row["task"] for row in rows(skewed.sites[site])).most_common(2)
        assert sum(count for _, count in own) > 0.9 * splits.ROWS
        assert len({row["task"] for row in rows(iid.sites[site])}) == 9
    for files in (skewed, iid):
        trained = {(row["task"], row["input"]) for path in files.sites.values() for row in rows(path)}
        for apart in (files.held_out, files.root):
            assert not trained & {(row["task"], row["input"]) for row in rows(apart)}
        assert all(row["chosen"] == row["output"] != row["rejected"] for row in rows(files.root))


@pytest.mark.parametrize("attack", [NONE, *ATTACKS])
def test_a_lie_is_what_is_encoded(attack: str, tmp_path: Path) -> None:
    true = np.random.default_rng(1).standard_normal((50, 40)).astype(np.float32)
    save_arrays({"x": true}, tmp_path / "delta", durable=False)
    plan = checked(Cell("fedavg", "iid", 0, attack))
    manifest, _ = lying(encode_delta)(tmp_path / "delta", plan, tmp_path / "payload")
    (sent,) = decode(manifest, tmp_path / "payload").values()
    match attack:
        case "none":
            np.testing.assert_array_equal(sent, true)
        case "sign-flip":
            np.testing.assert_array_equal(sent, -10 * true)
        case "scaled":
            np.testing.assert_array_equal(sent, 50 * true)
        case _:
            assert np.linalg.norm(sent) == pytest.approx(10 * np.linalg.norm(true), rel=0.05)
            assert abs(np.vdot(sent, true)) < 0.1 * np.linalg.norm(sent) * np.linalg.norm(true)


def commit(round_: int, parts: Mapping[str, int], losses: Mapping[str, float], up: int) -> Commit:
    version = Version(
        number=round_,
        parts=[VersionPart(name=name, digest=name.encode(), payload_bytes=size) for name, size in parts.items()],
    )
    seconds = [Metric(name="seconds", value=2.0 * round_)]
    updates = ("hospital-a", runs.LIAR, runs.ROOT) if round_ else ("hospital-a",)
    return Commit(
        round=round_,
        version=version,
        contributions=[Contribution(member=name, payload_bytes=up, metrics=seconds) for name in updates],
        metrics=[
            MemberMetrics(
                member=name,
                metrics=[
                    Metric(name="loss", value=loss, weight=3 if name == "hospital-a" else 1),
                    Metric(name="exact_match", value=loss / 100, weight=1),
                ],
            )
            for name, loss in losses.items()
        ],
    )


def test_what_a_run_tells() -> None:
    before = {"hospital-a": 8.0, runs.LIAR: 4.0, runs.EXAMINER: 9.0}
    after = {"hospital-a": 2.0, runs.LIAR: 6.0, runs.EXAMINER: 5.0}
    commits = [
        commit(0, {"a0": 100, "b": 50}, before, 0),
        commit(1, {"a1": 100, "b": 50}, {}, 10),
        commit(2, {"a2": 100, "b": 50, "base/1": 30}, after, 20),
    ]
    found = runs.read(Cell("fedavg", "iid", 0), Run(commits=commits), 99.0, 12.0)
    assert found.held_out == Score(9.0, 5.0, 0.05)
    assert found.own == Score(7.0, 3.0, 0.04)
    assert found.honest == Score(8.0, 2.0, 0.02)
    assert (found.up, found.down) == (15.0, 115.0)
    assert found.train_seconds == 3.0


def result(method: str, loss: float, seed: int = 0, attack: str = NONE, split: str = "iid") -> runs.Measured:
    score = Score(9.0, loss, 0.5)
    return begin(Cell(method, split, seed, attack), held_out=score, own=score, honest=score, up=2048.0)


def test_results_are_kept_and_what_is_there_is_not_run_again(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "results.jsonl"
    results = Results(path)
    assert not results.found
    results.add(result("fedavg", 1.0))
    results.add(begin(Cell("krum", "iid", 0), failure="no quorum"))
    results.add(replace(result("fedprox", 1.0), plan="of another plan"))
    path.write_text(path.read_text() + json.dumps({**json.loads(path.read_text().splitlines()[0]), "method": "gone"}))
    again = Results(path)
    assert again.found == results.found
    assert again.found[Cell("fedavg", "iid", 0)].held_out == Score(9.0, 1.0, 0.5)
    wanted = [Cell(name, "iid", 0) for name in ("fedavg", "krum", "fedprox", "median")]
    assert again.missing(wanted) == wanted[1:]


def test_the_lock_is_held_during_runs_and_free_afterwards(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    wanted = [Cell("fedavg", "iid", seed) for seed in range(25)]
    free: list[bool] = []
    with lock.open("a") as other:
        for cell in runs.by_turns(wanted, lock):
            assert cell == wanted[len(free)]
            try:
                fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                free.append(False)
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert free == [False] * 25
    assert list(runs.by_turns(wanted, None)) == wanted


def test_the_tables_say_what_was_measured_and_what_was_not(tmp_path: Path) -> None:
    kept = [
        result("fedavg", 1.0),
        result("fedavg", 2.0, seed=1),
        result("krum", 1.25),
        begin(Cell("median", "iid", 0), failure="too few updates"),
        result("fedadam", 8.99),
        *(result("fedavg", 7.0, attack=attack) for attack in ATTACKS),
        result("fedavg", 10.0, seed=1, attack="sign-flip"),
        *(result("krum", loss, attack=attack) for attack, loss in zip(ATTACKS, (1.5, 1.25, 1.0), strict=True)),
    ]
    results = Results(tmp_path / "results.jsonl")
    for one in kept:
        results.add(one)
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- methods:begin -->\n<!-- methods:end -->\nafter\n")
    arguments = ["--minutes", "0", "--seeds", "0,1", "--out", str(tmp_path), "--write", str(page)]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0, done.output
    lines = page.read_text().splitlines()
    assert lines[0] == "before"
    assert lines[-1] == "after"
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|")]
    fedavg, attacked = (row for row in rows if row[0] == "fedavg")
    assert fedavg[1:4] == ["0, 1", "9.00 -> 1.500 (1.000 to 2.000)", "50 (50 to 50) %"]
    assert attacked[1:] == ["1.500 (1.000 to 2.000)", "8.500 (+7.000, at most +8.000)", *["7.000 (+6.000)"] * 2]
    assert ["krum", "0", "9.00 -> 1.250", "50 %"] in [row[:4] for row in rows]
    assert ["krum", "1.250", "1.500 (+0.250)", "1.250 (+0.000)", "1.000 (-0.250)"] in rows
    assert [row[1:] for row in rows if row[0] == "median"] == [[tables.NOT_RUN] * 4]
    text = "\n".join(lines)
    skewed, iid = (line for line in lines if line.startswith("Not run, or not to the end: "))
    assert "fedavg, " in skewed
    assert "fedavg, " not in iid
    assert "median, " in iid
    assert "within 0.250 (krum) of its clean run: of the robust rules, so far: krum." in text
    assert "the worst attack costs fedavg 8.000." in text
    assert "`median--iid-0--none` did not end: too few updates" in text
    assert "`fedadam--iid-0--none`: the held-out loss did not fall (9.000 -> 8.990)" in text
    assert "`fedadam--iid-0--none`: the sites' own loss did not fall" in text


def test_an_unknown_method_is_refused(tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["--methods", "fedavg,fedawg", "--out", str(tmp_path)])
    assert done.exit_code == 2
    assert "'fedawg' is none of" in done.output
