"""The robust rules in a plan, on factors, and on products as the server computes them."""

import json
import math
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from robust_rules import RULES, made, result

from fsllm.v1.tensors_pb2 import ELEMENT_TYPE_FLOAT32, TENSOR_ROLE_LORA_A, TENSOR_ROLE_LORA_B, TENSOR_ROLE_MAGNITUDE
from fsllm_common.algorithms import ADAPTER, Update, algorithm_class
from fsllm_common.errors import PlanInvalid
from fsllm_common.plan import canonical_json, plan_from_json
from fsllm_server.reduce.blocks import Source
from fsllm_server.reduce.products import inner_products


def refusal(name: str, quorum: int = 100, kind: str = "ia3", **parameters: Any) -> str:  # noqa: ANN401
    raw = {
        "name": "p",
        "model": {"name": "m"},
        "adapter": {"kind": kind},
        "cohort": {"quorum": quorum},
        "algorithm": {"name": name, "parameters": parameters},
    }
    try:
        plan = plan_from_json(json.dumps(raw).encode())
    except PlanInvalid as error:
        return error.message
    assert plan_from_json(canonical_json(plan)) == plan
    return ""


@pytest.mark.parametrize(
    ("name", "parameters", "least"),
    [
        ("krum", {}, 5),
        ("krum", {"byzantine": 3}, 9),
        ("multi-krum", {"byzantine": 2}, 7),
        ("multi-krum", {"byzantine": 2, "selected": 8}, 10),
        ("bulyan", {}, 7),
        ("bulyan", {"byzantine": 2}, 11),
        ("trimmed-mean", {"trim": 0.3}, 4),
        ("fltrust", {}, 2),
        ("median", {}, 3),
        ("geometric-median", {}, 3),
        ("centred-clipping", {}, 3),
    ],
)
def test_a_quorum_too_small_for_the_rule_is_refused(name: str, parameters: dict[str, Any], least: int) -> None:
    assert refusal(name, least, **parameters) == ""
    assert "cohort.quorum, cohort.buffer, algorithm.parameters" in refusal(name, least - 1, **parameters)


@pytest.mark.parametrize("kind", ["lora", "rslora", "dora"])
def test_coordinates_of_two_trained_factors_are_refused(kind: str) -> None:
    for name in ("median", "trimmed-mean", "bulyan"):
        assert "freeze_a: true" in refusal(name, kind=kind)
        assert refusal(name, kind=kind, freeze_a=True) == ""
        assert refusal(name, kind="ia3") == ""
        assert "no A to freeze" in refusal(name, kind="ia3", freeze_a=True)
    for name in ("krum", "multi-krum", "norm-bound", "geometric-median", "centred-clipping", "fltrust"):
        assert refusal(name, kind=kind) == ""
        assert refusal(name, kind=kind, freeze_a=True) == ""


def test_parameters_out_of_range_are_refused() -> None:
    for name, parameters in (
        ("trimmed-mean", {"trim": 0.5}),
        ("trimmed-mean", {"trim": 0}),
        ("krum", {"byzantine": -1}),
        ("multi-krum", {"selected": 0}),
        ("norm-bound", {"bound": 0}),
        ("norm-bound", {"bound": "mean"}),
        ("median", {"byzantine": 1}),
    ):
        assert "algorithm.parameters" in refusal(name, **parameters)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", [*RULES, "fltrust"])
def test_a_frozen_a_is_in_a_part_that_never_moves(name: str) -> None:
    raw = {
        "name": "p",
        "model": {"name": "m"},
        "cohort": {"quorum": 100},
        "algorithm": {"name": name, "parameters": {"freeze_a": True}},
    }
    rule = algorithm_class(name)(plan_from_json(json.dumps(raw).encode()))
    assert rule.part(TENSOR_ROLE_LORA_A) not in rule.moving(1)
    assert rule.part(TENSOR_ROLE_LORA_B) == rule.part(TENSOR_ROLE_MAGNITUDE) == ADAPTER
    assert rule.moving(1) == rule.moving(2) == (ADAPTER,)
    assert made(name).part(TENSOR_ROLE_LORA_A) == ADAPTER


def test_why_coordinates_of_two_trained_factors_mean_nothing() -> None:
    """Two of three sites agree on B A; the median of factors that a rotation has turned is not what they agree on."""
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 6)), rng.standard_normal((6, 2))

    def turned(angle: float) -> tuple[Any, Any]:
        g = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
        return b @ g, g.T @ a

    pairs = [turned(angle) for angle in (0.0, 2.0, 4.0)]
    for one_b, one_a in pairs:
        np.testing.assert_allclose(one_b @ one_a, b @ a)

    def middle(values: list[Any]) -> Any:  # noqa: ANN401
        return result(made("median"), [value.ravel() for value in values]).reshape(values[0].shape)

    trained = middle([one_b for one_b, _ in pairs]) @ middle([one_a for _, one_a in pairs])
    assert np.linalg.norm(trained - b @ a) > 0.5 * np.linalg.norm(b @ a)
    np.testing.assert_allclose(middle([b, b, 9 * b]) @ a, b @ a, rtol=1e-5)


PRODUCTS = ["krum", "bulyan", "geometric-median", "centred-clipping", "fltrust", "norm-bound"]


def at_its_peak(make: Callable[[], Any]) -> tuple[Any, int]:
    """Return what is made, and the most bytes that were in use meanwhile."""
    tracemalloc.start()
    made_of = make()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return made_of, peak


@pytest.mark.parametrize("name", PRODUCTS)
def test_memory_is_what_docs_algorithms_says_of_products(tmp_path: Path, name: str) -> None:
    """32 MiB of values and 40 K x K bytes; besides, the block that is read, and a few objects an update."""
    count, mebibyte = 400, 2**20
    (tmp_path / "u").write_bytes(np.arange(count, dtype=np.float32).tobytes())
    sources = [Source(tmp_path / "u", ELEMENT_TYPE_FLOAT32, ((i, 1),)) for i in range(count)]
    updates = [Update("s", 1, 1, 1, i == 0) for i in range(count)]
    products, peak = at_its_peak(lambda: inner_products(sources, 1))
    assert 32 * mebibyte < peak < 34 * mebibyte + 40 * count**2
    _, peak = at_its_peak(lambda: made(name).weigh_by_products(updates, products))
    assert products.nbytes + peak < mebibyte + 40 * count**2


@pytest.mark.parametrize("rule", PRODUCTS)
def test_on_products_as_the_server_computes_them(tmp_path: Path, rule: str) -> None:
    """And with updates that nearly agree, far from 0: distances do not drown in what all have in common."""
    rng = np.random.default_rng(1)
    rows = (100 + 1e-3 * rng.standard_normal((9, 4000))).astype(np.float32)
    for i, row in enumerate(rows):
        (tmp_path / f"u{i}").write_bytes(row.tobytes())
    products = inner_products([Source(tmp_path / f"u{i}", ELEMENT_TYPE_FLOAT32) for i in range(9)], 4000)
    updates = [Update(f"s{i}", 1, 1, 1, i == 0) for i in range(9)]
    exact = rows.astype(np.longdouble)
    weigh: Callable[..., list[float]] = made(rule).weigh_by_products
    wanted = weigh(updates, np.array([[float((x * y).sum()) for y in exact] for x in exact]))
    np.testing.assert_allclose(weigh(updates, products), wanted, rtol=1e-6, atol=1e-9)
