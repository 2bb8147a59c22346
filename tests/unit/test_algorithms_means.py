"""What a round makes of LoRA's factors, beside numpy: weights, FedIT's means, LoRA-FAIR's correction, narrow wires."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lora_federation import DIFFERENT, MODULES, SAME, SHARES, Federation, make_plan

from fsllm_common.algorithms import Update, algorithm_class, algorithm_names
from fsllm_common.plan import Plan

ONE_RANK: dict[str, Any] = {"ranks": ()}
LAYERS = [name for name in algorithm_names() if algorithm_class(name).needs_layers and name != "fedask"]
"""But for FedASK, whose sites send sketches of all that they have rather than changes."""


def factors(tensors: dict[str, Any], module: str) -> tuple[Any, Any]:
    """Return a module's A and B in float64."""
    a, b = (tensors[f"{module}.lora_{key}.weight"].astype(np.float64) for key in "AB")
    return a, b


def random_change(federation: Federation) -> Callable[[int, str, Any], Any]:
    """Return a training that says nothing."""
    return lambda site, name, received: federation.random.normal(size=received.shape, scale=0.3)


@pytest.mark.parametrize(
    ("weighting", "counts"),
    [("examples", (3, 5, 8)), ("tokens", (70, 20, 10)), ("uniform", (1, 1, 1)), ("capped", (3, 4, 4))],
)
def test_an_update_counts_for_what_the_plan_says(weighting: str, counts: tuple[int, ...]) -> None:
    algorithm = {"name": "fedavg", "weighting": weighting, "weight_cap": 4}
    plan = Plan.model_validate({"name": "x", "model": {"name": "m"}, "algorithm": algorithm})
    updates = [Update("a", 3, 70, 9), Update("b", 5, 20, 9), Update("c", 8, 10, 9)]
    assert algorithm_class("fedavg")(plan).weigh(updates) == [count / sum(counts) for count in counts]


@pytest.mark.parametrize("name", ["fedit", "fedavg"])
def test_fedit_is_the_weighted_mean_of_each_factor(tmp_path: Path, name: str) -> None:
    federation = Federation(tmp_path, make_plan(name, adapter=ONE_RANK), SAME)
    for _ in range(2):
        after = federation.send(random_change(federation))
        found = federation.received(4)
        assert found.keys() == after[0].keys()
        for tensor, array in found.items():
            mean = sum(share * mine[tensor].astype(np.float64) for share, mine in zip(SHARES, after, strict=True))
            np.testing.assert_allclose(array, mean, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("ridge", [0.01, 3.0])
def test_fair_corrects_b_by_what_least_squares_say(tmp_path: Path, ridge: float) -> None:
    """|W - (B' + dB) A'|^2 + ridge |dB|^2 as one system, W formed: [A'^T; sqrt(ridge) I] dB^T = [(W - B'A')^T; 0]."""
    federation = Federation(tmp_path, make_plan("lora-fair", adapter=ONE_RANK, parameters={"ridge": ridge}), SAME)
    for _ in range(2):
        after = federation.send(random_change(federation))
        for module in MODULES:
            sites = [factors(mine, module) for mine in after]
            a = sum(share * one for share, (one, _) in zip(SHARES, sites, strict=True))
            b = sum(share * one for share, (_, one) in zip(SHARES, sites, strict=True))
            exact = sum(share * two @ one for share, (one, two) in zip(SHARES, sites, strict=True))
            left = np.vstack([a.T, ridge**0.5 * np.eye(4)])
            right = np.vstack([(exact - b @ a).T, np.zeros((4, len(b)))])
            correction = np.linalg.lstsq(left, right, rcond=None)[0].T
            assert np.linalg.norm(correction) > 1e-2 * np.linalg.norm(b)
            found_a, found_b = factors(federation.received(4), module)
            np.testing.assert_allclose(found_a, a, rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(found_b, b + correction, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "ranks", "parameters"),
    [
        *((name, SAME, {}) for name in LAYERS),
        *((name, DIFFERENT, {}) for name in (*LAYERS, "ffa-lora", "rolora") if algorithm_class(name).any_rank),
        *((name, SAME, {"ledger_rank": 14}) for name in ("flora", "fedex-lora", "rac-lora")),
    ],
)
def test_changes_smaller_than_the_wire_can_tell_add_up(
    tmp_path: Path, name: str, ranks: tuple[int, ...], parameters: dict[str, Any]
) -> None:
    """bf16 tells numbers apart that differ by 0.4 to 0.8 %; here are ten rounds of 0.1 % each."""

    def play(wire: str) -> tuple[list[list[str]], dict[str, Any]]:
        (folder := tmp_path / wire).mkdir()
        adapter = ONE_RANK if ranks == SAME else {}
        federation = Federation(folder, make_plan(name, adapter=adapter, wire=wire, parameters=parameters), ranks)
        federation.send(lambda site, tensor, received: np.ones_like(received))
        for _ in range(10):
            federation.send(lambda site, tensor, received: np.full_like(received, 1e-3 * ("lora_B" in tensor)))
        return [[part.master for part in version.parts] for version in federation.versions], federation.gained(4)

    (masters, exact), (narrow, rounded) = play("fp32"), play("bf16")
    # What was rounded off for the sites is still there: the server's own numbers are those of a wire without rounding.
    assert narrow == masters
    assert len({*map(tuple, masters)}) == 12
    for module in MODULES:
        # Half a unit in the last place of each factor.
        assert np.linalg.norm(rounded[module] - exact[module]) < 2 * 2**-8 * np.linalg.norm(exact[module])
