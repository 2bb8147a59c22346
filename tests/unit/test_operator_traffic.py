"""What travels in a round, by hand for one module of each shape."""

from typing import Any

import pytest

from fsllm_common.plan import Plan
from fsllm_operator.traffic import Traffic, traffic

A, B = 4 * 10, 6 * 4
SHAPES = {"m.q_proj.lora_A.weight": (4, 10), "m.q_proj.lora_B.weight": (6, 4)}


@pytest.mark.parametrize(
    ("name", "keys", "expected"),
    [
        ("fedavg", {}, Traffic(A + B, A + B)),
        ("ffa-lora", {}, Traffic(B, B)),
        ("fedsa-lora", {}, Traffic(A, A)),
        ("rolora", {}, Traffic((A + B) // 2, (A + B) // 2)),
        ("scaffold", {"cohort": {"sites": ["a", "b"]}}, Traffic(2 * (A + B), 2 * (A + B))),
        # The fresh adapter, and 3 x 4 columns of U and rows of V.
        ("flora", {"cohort": {"size": 3}}, Traffic(A + B + 12 * (10 + 6), A + B)),
        ("flora", {"cohort": {"sites": ["a", "b", "c"]}}, Traffic(A + B + 12 * (10 + 6), A + B)),
        ("flora", {"cohort": {"quorum": 3}}, Traffic(A + B + 12 * (10 + 6), A + B, grows=True)),
        ("rac-lora", {}, Traffic(A + B + 4 * (10 + 6), B)),
        # The sketches of both exchanges have 6 columns: as many as the module has outputs.
        ("fedask", {}, Traffic((6 * 6 + A + B) // 2, (6 * 6 + 10 * 6) // 2)),
    ],
)
def test_what_travels(name: str, keys: dict[str, Any], expected: Traffic) -> None:
    plan = Plan.model_validate(
        {"name": "p", "rounds": 4, "model": {"name": "m"}, "adapter": {"rank": 4}, "algorithm": {"name": name}, **keys}
    )
    assert traffic(plan, SHAPES) == expected


def test_tensors_that_can_not_be_told_apart_are_taken_to_travel_whole() -> None:
    plan = Plan.model_validate({"name": "p", "model": {"name": "m"}, "algorithm": {"name": "ffa-lora"}})
    assert traffic(plan, {"adapter": (100,)}) == Traffic(100, 100)
