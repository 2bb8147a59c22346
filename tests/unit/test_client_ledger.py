"""The privacy ledger: durable, exactly once, and epsilons that add up as the theory says."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fsllm_client.site.ledger import Ledger, Release, combined_multiplier
from fsllm_client.site.policy import PlanNoise, Policy
from fsllm_client.site.privacy import PrivacyBudget, closed_form, noise_of
from fsllm_common.accounting.budget import Entry, epsilon
from fsllm_common.errors import FsllmError, PolicyRefused
from fsllm_common.plan import Plan


def rdp_epsilon(multipliers: list[float], delta: float) -> float:
    """Return the epsilon of releases whose Renyi costs are added one by one."""
    return epsilon([Entry("r", at, multiplier, delta) for at, multiplier in enumerate(multipliers)], delta)


RELEASE = Release(
    at="2026-01-01T00:00:00+00:00",
    run_id="r1",
    run_name="run",
    round=1,
    digest="aa",
    clip_norm=1.0,
    multiplier=2.0,
    delta=1e-5,
    epsilon=2.2,
    epsilon_total=2.2,
)


def test_a_release_is_on_disk_when_record_returns_and_is_counted_once(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(path)
    ledger.record(RELEASE)
    ledger.record(replace(RELEASE, at="2026-01-02T00:00:00+00:00"))
    assert Ledger(path).releases == [RELEASE]
    assert path.stat().st_mode & 0o777 == 0o600
    ledger.record(replace(RELEASE, digest="bb"))
    ledger.record(replace(RELEASE, round=2))
    assert [(r.round, r.digest) for r in Ledger(path).releases] == [(1, "aa"), (1, "bb"), (2, "aa")]
    assert Ledger(path).holds("r1", 1, "bb")
    assert not Ledger(path).holds("r2", 1, "bb")


@given(cut=st.integers(min_value=1, max_value=200))
def test_a_line_cut_short_by_a_crash_is_cut_off_and_written_over(
    tmp_path_factory: pytest.TempPathFactory, cut: int
) -> None:
    path = tmp_path_factory.mktemp("ledger") / "ledger.jsonl"
    ledger = Ledger(path)
    ledger.record(RELEASE)
    whole = path.stat().st_size
    ledger.record(replace(RELEASE, round=2))
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(max(whole, size - cut))
    again = Ledger(path)
    assert again.releases == [RELEASE]
    again.record(replace(RELEASE, round=3))
    assert [r.round for r in Ledger(path).releases] == [1, 3]


def test_a_damaged_line_is_said_not_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    Ledger(path).record(RELEASE)
    path.write_bytes(path.read_bytes() + b'{"round": 2}\n')
    with pytest.raises(FsllmError, match="line 2") as caught:
        Ledger(path)
    assert caught.value.reason == "STATE_CORRUPT"


@given(multipliers=st.lists(st.floats(min_value=0.3, max_value=30), min_size=1, max_size=8))
def test_one_release_of_the_combined_multiplier_is_as_private_as_all(multipliers: list[float]) -> None:
    combined = combined_multiplier(multipliers)
    assert rdp_epsilon([combined], 1e-5) == pytest.approx(rdp_epsilon(multipliers, 1e-5), rel=1e-9)


async def test_the_forecast_counts_this_run_and_all_runs(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.record(RELEASE)
    ledger.record(replace(RELEASE, run_id="r2", multiplier=4.0))
    spent = await ledger.forecast(closed_form, "r1", PlanNoise(1.0, 2.0, 1e-5), releases=2, delta=1e-6)
    assert spent.run == pytest.approx(rdp_epsilon([2.0] * 3, 1e-5), rel=1e-9)
    assert spent.total == pytest.approx(rdp_epsilon([2.0, 4.0, 2.0, 2.0], 1e-6), rel=1e-9)


async def test_the_budget_refuses_the_first_release_that_passes_it(tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    path.write_text(f"[privacy]\nmaximum_epsilon_per_run = {rdp_epsilon([2.0] * 3, 1e-5) + 1e-6}")
    policy, noise = Policy.read(path), PlanNoise(1.0, 2.0, 1e-5)
    plan = Plan.model_validate({"name": "p", "rounds": 3, "model": {"name": "m"}})
    ledger = Ledger(tmp_path / "ledger.jsonl")
    budget = PrivacyBudget(ledger)
    await budget.refuse_plan(plan, "r1", policy, noise)
    for round_ in (1, 2, 3):
        spent = await budget.refuse_release(closed_form, "r1", policy, noise)
        budget.record(plan, "r1", round_, bytes([round_]) * 32, noise, spent)
        budget.record(plan, "r1", round_, bytes([round_]) * 32, noise, spent)
        # A plan that is asked about again, after a restart, is judged by the rounds that are left.
        await budget.refuse_plan(plan, "r1", policy, noise)
    with pytest.raises(PolicyRefused) as caught:
        await budget.refuse_release(closed_form, "r1", policy, noise)
    assert caught.value.reason == "BUDGET_SPENT"
    with pytest.raises(PolicyRefused, match="all rounds of the plan"):
        await budget.refuse_plan(plan.model_copy(update={"rounds": 4}), "r2", policy, noise)
    lines = [json.loads(line) for line in ledger.path.read_text().splitlines()]
    assert [line["round"] for line in lines] == [1, 2, 3]
    assert lines[2]["epsilon"] == pytest.approx(rdp_epsilon([2.0] * 3, 1e-5))


@pytest.mark.parametrize(
    ("role", "algorithm", "noised"), [("site", "fedavg", True), ("evaluator", "fedavg", False), ("site", "noop", False)]
)
def test_only_a_sites_trained_deltas_are_releases(role: str, algorithm: str, noised: bool) -> None:
    plan = Plan.model_validate(
        {
            "name": "p",
            "model": {"name": "m"},
            "algorithm": {"name": algorithm},
            "pipeline": [{"stage": "clip", "norm": 1}, {"stage": "noise", "multiplier": 1}],
        }
    )
    assert (noise_of(plan, role) is not None) is noised
