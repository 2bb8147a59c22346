import math

import pytest

from fsllm_client.trainer.schedule import learning_rate
from fsllm_common.plan import Plan


def _plan(rounds: int, **train: object) -> Plan:
    return Plan.model_validate(
        {"name": "t", "model": {"name": "m"}, "rounds": rounds, "train": {"learning_rate": 2.0, **train}}
    )


def test_constant_is_the_rate_itself() -> None:
    plan = _plan(5, schedule="constant")
    assert [learning_rate(plan, r) for r in range(1, 6)] == [2.0] * 5


def test_warm_up_climbs_in_equal_steps_to_the_full_rate() -> None:
    plan = _plan(6, schedule="constant", warmup_rounds=3)
    assert [learning_rate(plan, r) for r in range(1, 6)] == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0])


def test_linear_falls_in_equal_steps_to_the_final_fraction() -> None:
    plan = _plan(5, schedule="linear", final_fraction=0.2)
    assert [learning_rate(plan, r) for r in range(1, 6)] == pytest.approx([2.0, 1.6, 1.2, 0.8, 0.4])


def test_cosine_passes_its_closed_form_at_quarter_half_and_end() -> None:
    plan = _plan(5, schedule="cosine", final_fraction=0.0)
    half_root = math.sqrt(2) / 2
    assert [learning_rate(plan, r) for r in range(1, 6)] == pytest.approx([2.0, 1 + half_root, 1.0, 1 - half_root, 0.0])


def test_the_fall_begins_after_the_warm_up() -> None:
    plan = _plan(5, schedule="linear", final_fraction=0.0, warmup_rounds=2)
    assert [learning_rate(plan, r) for r in range(1, 6)] == pytest.approx([2 / 3, 4 / 3, 2.0, 1.0, 0.0])


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_a_run_of_one_round_has_the_full_rate(schedule: str) -> None:
    assert learning_rate(_plan(1, schedule=schedule), 1) == 2.0


def test_a_round_past_the_last_keeps_the_last_rate() -> None:
    plan = _plan(3, schedule="cosine", final_fraction=0.1)
    assert learning_rate(plan, 9) == learning_rate(plan, 3) == pytest.approx(0.2)
