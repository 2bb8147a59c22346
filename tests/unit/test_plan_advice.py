"""What a plan's author is told besides: the noise is compared with the signal, and combinations that need a word."""

import json
import math
from typing import Any

import numpy as np
import pytest

from fsllm_common.accounting.budget import epsilon_of
from fsllm_common.pipeline import apply_client, build
from fsllm_common.plan import Plan, plan_from_json
from fsllm_common.plan.advice import noise_ratio, synthetic_parameters, warnings

CLIP = {"stage": "clip", "norm": 2.0}
NOISE = {"stage": "noise", "multiplier": 0.5}
UNIFORM = {"weighting": "uniform"}
SCAFFOLD = {"name": "scaffold", "parameters": {"sites": 4}}


def load(changes: dict[str, Any]) -> Plan:
    return plan_from_json(json.dumps({"name": "trial", "model": {"name": "embedded"}, **changes}).encode())


def noisy(multiplier: float, mebibytes: float, size: int = 4, **changes: dict[str, Any]) -> Plan:
    return load(
        {
            "model": {"name": "synthetic"},
            "algorithm": {"name": "noop", **UNIFORM, "synthetic": {"mebibytes": mebibytes}},
            "cohort": {"size": size},
            "pipeline": [CLIP, {"stage": "noise", "multiplier": multiplier}],
            **changes,
        }
    )


def test_the_ratio_is_what_the_pipeline_really_adds() -> None:
    """The mean of K noised zeros, from the stages themselves, has the norm that the formula says."""
    plan = noisy(0.5, mebibytes=0.05)
    parameters = synthetic_parameters(plan)
    mean = np.mean([_noised_zeros(plan, parameters) for _ in range(4)], axis=0)
    ratio = noise_ratio(plan, parameters)
    assert ratio is not None
    assert ratio.updates == 4
    assert ratio.ratio == pytest.approx(0.5 * math.sqrt(parameters / 4))
    # A chi of 13,107 degrees deviates by 1 / sqrt(2 P) = 0.6 % of its mean: five of these.
    assert float(np.linalg.norm(mean)) / 2.0 == pytest.approx(ratio.ratio, rel=0.031)


def _noised_zeros(plan: Plan, parameters: int) -> np.ndarray:
    delta, _ = apply_client(build(plan), {"x": np.zeros(parameters, np.float32)})
    return delta["x"].astype(np.float64)


def test_the_number_of_updates_is_the_plans() -> None:
    assert noise_ratio(noisy(1.0, 1, size=9), 100).ratio == pytest.approx(10 / 3)  # type: ignore[union-attr]
    by_sites = load({"cohort": {"sites": ["a", "b", "c"]}, "pipeline": [CLIP, NOISE], "algorithm": UNIFORM})
    assert noise_ratio(by_sites, 100).updates == 3  # type: ignore[union-attr]
    asynchronous = {"sites": list("abcdefghij"), "buffer": {"size": 2}}
    by_buffer = load({"cohort": asynchronous, "pipeline": [CLIP, NOISE], "algorithm": UNIFORM})
    assert noise_ratio(by_buffer, 100).updates == 2  # type: ignore[union-attr]
    by_quorum = load({"cohort": {"quorum": 5}, "pipeline": [CLIP, NOISE], "algorithm": UNIFORM})
    assert noise_ratio(by_quorum, 100).updates == 5  # type: ignore[union-attr]
    assert noise_ratio(by_quorum, 100, updates=7).updates == 7  # type: ignore[union-attr]
    assert noise_ratio(load({}), 100) is None


def test_the_warning_says_that_noise_drowns_the_signal_and_when_not() -> None:
    (privacy, signal) = warnings(noisy(0.5, mebibytes=8))
    assert f"epsilon {epsilon_of(0.5, 10, 1e-5):.3g} at delta 1e-05 in 10 rounds" in privacy
    parameters = 8 * 2**18
    assert f"drowns the signal: over the {parameters} numbers of an update and 4 updates" in signal
    assert f"{0.5 * math.sqrt(parameters / 4):.3g} times the clip norm" in signal
    assert f"{parameters // 4} updates or 16 numbers" in signal
    (_, little) = warnings(noisy(0.5, mebibytes=8), parameters=15)
    assert "leaves a signal" in little
    real = load({"cohort": {"size": 4}, "pipeline": [CLIP, NOISE], "algorithm": UNIFORM})
    (_, unknown) = warnings(real)
    assert "more than 16 numbers" in unknown


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"wire": {"element_type": "fp16"}}, "65504"),
        ({"algorithm": {"weight_cap": 5}}, "weight_cap has no effect"),
        ({"cohort": {"quorum": 1}}, "one site's delta alone"),
        ({"algorithm": {"name": "fedsa-lora"}}, "each site measures a model of its own"),
        ({"data": {"validation_fraction": 0}}, "nothing to evaluate on"),
        ({"adapter": {"kind": "prompt", "dropout": 0.1}, "data": {"packing": False}}, "dropout has no effect"),
        ({"algorithm": SCAFFOLD}, "scaffold undoes the sites' drift where steps are plain"),
        ({"algorithm": {"name": "flora"}}, "the sites' ledgers keep that: bf16 loses"),
        ({"rounds": 2, "algorithm": {"name": "fedask"}}, "sketches are of whole factors"),
        ({"algorithm": {"name": "rac-lora"}, "wire": {"element_type": "fp16"}}, "fp16 0.05 %"),
        ({"pipeline": [CLIP, NOISE], "algorithm": UNIFORM, "wire": {"max_update_norm": 9}}, "compared with the noised"),
    ],
)
def test_other_advice(changes: dict[str, Any], words: str) -> None:
    assert any(words in warning for warning in warnings(load(changes)))
    assert not any(words in warning for warning in warnings(load({})))


def test_a_plain_plan_gives_no_warning() -> None:
    assert warnings(load({})) == []
    assert warnings(load({"algorithm": SCAFFOLD, "train": {"optimizer": "sgd", "max_grad_norm": 0}})) == []
    assert warnings(load({"algorithm": {"name": "fedex-lora"}, "wire": {"element_type": "fp32"}})) == []
