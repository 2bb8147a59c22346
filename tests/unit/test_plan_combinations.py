"""Each refused combination refuses and its nearest neighbour does not; the noise is compared with the signal."""

import json
import math
from typing import Any

import numpy as np
import pytest

from fsllm_common.accounting.budget import epsilon_of
from fsllm_common.errors import PlanInvalid
from fsllm_common.pipeline import apply_client, build
from fsllm_common.plan import Plan, plan_from_json
from fsllm_common.plan.advice import noise_ratio, synthetic_parameters, warnings
from fsllm_common.plan.combinations import REFUSED

CLIP = {"stage": "clip", "norm": 2.0}
NOISE = {"stage": "noise", "multiplier": 0.5}
UNIFORM = {"weighting": "uniform"}
NOOP = {"name": "noop"}
SYNTHETIC = {"name": "synthetic"}


def load(changes: dict[str, Any]) -> Plan:
    return plan_from_json(json.dumps({"name": "trial", "model": {"name": "embedded"}, **changes}).encode())


# (what is refused, words of the reason, the nearest plan that is not)
CASES: list[tuple[dict[str, Any], str, dict[str, Any]]] = [
    ({"train": {"steps": 5, "epochs": 1}}, "set steps: null", {"train": {"steps": None, "epochs": 1}}),
    ({"train": {"steps": None}}, "one of them is needed", {"train": {"steps": 1}}),
    (
        {"train": {"batch_size": 16, "micro_batch_size": 5}},
        "must divide",
        {"train": {"batch_size": 15, "micro_batch_size": 5}},
    ),
    (
        {"rounds": 3, "train": {"warmup_rounds": 3}},
        "warm up for fewer rounds",
        {"rounds": 3, "train": {"warmup_rounds": 2}},
    ),
    (
        {
            "adapter": {"kind": "prefix"},
            "data": {"packing": False},
            "train": {"gradient_checkpointing": True},
        },
        "drops the cache that a prefix is",
        {
            "adapter": {"kind": "prompt"},
            "data": {"packing": False},
            "train": {"gradient_checkpointing": True},
        },
    ),
    (
        {"deepspeed": {"zero_stage": 2, "offload_parameters": True}},
        "stage 3 only",
        {"deepspeed": {"zero_stage": 3, "offload_parameters": True}},
    ),
    ({"algorithm": NOOP}, "model.name: synthetic", {"algorithm": NOOP, "model": SYNTHETIC}),
    ({"model": SYNTHETIC}, "algorithm.name: noop", {"model": SYNTHETIC, "algorithm": NOOP}),
    (
        {"model": SYNTHETIC, "algorithm": NOOP, "evaluate": {"metrics": ["exact_match"]}},
        "without a model there are no answers",
        {"model": SYNTHETIC, "algorithm": NOOP, "evaluate": {"metrics": ["loss"]}},
    ),
    (
        {"model": SYNTHETIC, "algorithm": {**NOOP, "synthetic": {"tensors": 200_001}}},
        "at most 200000 tensors",
        {"model": SYNTHETIC, "algorithm": {**NOOP, "synthetic": {"tensors": 200_000}}},
    ),
    ({"cohort": {"sites": [], "quorum": 1}}, "nobody", {"cohort": {"sites": ["a"], "quorum": 1}}),
    ({"cohort": {"sites": ["a", "B"]}}, "a site's name", {"cohort": {"sites": ["a", "b"]}}),
    ({"cohort": {"sites": ["a", "b", "a"]}}, "named twice", {"cohort": {"sites": ["a", "b", "c"]}}),
    (
        {"cohort": {"sites": ["a", "b"], "quorum": 3}},
        "could never be reached",
        {"cohort": {"sites": ["a", "b"], "quorum": 2}},
    ),
    ({"cohort": {"size": 2, "quorum": 3}}, "fewer updates than its quorum", {"cohort": {"size": 3, "quorum": 3}}),
    (
        {"cohort": {"sites": ["a", "b"], "size": 3}},
        "the size is larger than the number of sites",
        {"cohort": {"sites": ["a", "b"], "size": 2}},
    ),
    ({"cohort": {"over_selection": 1.5}}, "give cohort.size", {"cohort": {"over_selection": 1.5, "size": 2}}),
    (
        {"adapter": {"kind": "prompt", "targets": ["q_proj"]}, "data": {"packing": False}},
        "adapts no modules",
        {"adapter": {"kind": "prompt"}, "data": {"packing": False}},
    ),
    ({"adapter": {"targets": []}}, "adapts nothing", {"adapter": {"targets": ["q_proj"]}}),
    ({"adapter": {"kind": "prefix"}}, "packing: false", {"adapter": {"kind": "prefix"}, "data": {"packing": False}}),
    ({"data": {"template": "alpacca"}}, "unknown template", {"data": {"template": "chatml"}}),
    (
        {"data": {"fields": {"prompt": "p", "output": "o"}}},
        "one format",
        {"data": {"fields": {"prompt": "p", "completion": "c"}}},
    ),
    (
        {"data": {"format": "chat", "fields": {"text": "t"}}},
        "one format",
        {"data": {"format": "text", "fields": {"text": "t"}}},
    ),
    (
        {"data": {"format": "text"}, "evaluate": {"metrics": ["exact_match"]}},
        "plain text has no answers",
        {"data": {"format": "completion"}, "evaluate": {"metrics": ["exact_match"]}},
    ),
    ({"pipeline": [CLIP, CLIP]}, "clip may stand there once", {"pipeline": [CLIP]}),
    (
        {"pipeline": [CLIP, NOISE, NOISE], "algorithm": UNIFORM},
        "noise may stand there once",
        {"pipeline": [CLIP, NOISE], "algorithm": UNIFORM},
    ),
    ({"pipeline": [NOISE], "algorithm": UNIFORM}, "Put a clip before it", {"pipeline": []}),
    (
        {"pipeline": [NOISE, CLIP], "algorithm": UNIFORM},
        "clip must come before noise",
        {"pipeline": [CLIP, NOISE], "algorithm": UNIFORM},
    ),
    (
        {"pipeline": [CLIP, NOISE], "algorithm": {"weighting": "capped"}},
        "say algorithm.weighting: uniform",
        {"pipeline": [CLIP], "algorithm": {"weighting": "capped"}},
    ),
    (
        {"pipeline": [CLIP], "wire": {"max_update_norm": 1.9}},
        "raise max_update_norm",
        {"pipeline": [CLIP], "wire": {"max_update_norm": 2.0}},
    ),
]


@pytest.mark.parametrize(("refused", "words", "allowed"), CASES)
def test_the_combination_is_refused_with_its_keys_and_reason_and_its_neighbour_is_not(
    refused: dict[str, Any], words: str, allowed: dict[str, Any]
) -> None:
    with pytest.raises(PlanInvalid) as caught:
        load(refused)
    assert words in caught.value.message
    (reason,) = [c for c in REFUSED if words in c.why]
    assert caught.value.message == f"{reason.keys}: {reason.why}"
    load(allowed)


def test_every_row_of_the_table_has_a_case() -> None:
    assert [c.why for c in REFUSED if not any(words in c.why for _, words, _ in CASES)] == []


def test_an_unknown_algorithm_names_the_nearest_and_the_known() -> None:
    with pytest.raises(PlanInvalid, match="unknown algorithm 'fedpro'; did you mean 'fedprox'"):
        load({"algorithm": {"name": "fedpro"}})
    with pytest.raises(PlanInvalid, match=r"installed: .*fedavg.*noop"):
        load({"algorithm": {"name": "zzz"}})


def noisy(multiplier: float, mebibytes: float, size: int = 4, **changes: dict[str, Any]) -> Plan:
    return load(
        {
            "model": SYNTHETIC,
            "algorithm": {**NOOP, **UNIFORM, "synthetic": {"mebibytes": mebibytes}},
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
    by_quorum = load({"cohort": {"quorum": 5}, "pipeline": [CLIP, NOISE], "algorithm": UNIFORM})
    assert noise_ratio(by_quorum, 100).updates == 5  # type: ignore[union-attr]
    assert noise_ratio(by_quorum, 100, updates=7).updates == 7  # type: ignore[union-attr]
    assert noise_ratio(load({}), 100) is None


def test_the_warning_says_that_noise_drowns_the_signal_and_when_not() -> None:
    (privacy, signal) = warnings(noisy(0.5, mebibytes=8))
    assert f"epsilon {epsilon_of(0.5, 10, 1e-5):.3g} at delta 1e-05 in 10 rounds" in privacy
    parameters = 8 * 2**18
    assert f"drowns the signal: over {parameters} parameters and 4 updates" in signal
    assert f"{0.5 * math.sqrt(parameters / 4):.3g} times the clip norm" in signal
    assert f"{parameters // 4} updates or 16 parameters" in signal
    (_, little) = warnings(noisy(0.5, mebibytes=8), parameters=15)
    assert "leaves a signal" in little
    real = load({"cohort": {"size": 4}, "pipeline": [CLIP, NOISE], "algorithm": UNIFORM})
    (_, unknown) = warnings(real)
    assert "more than 16 parameters" in unknown


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"wire": {"element_type": "fp16"}}, "65504"),
        ({"algorithm": {"weight_cap": 5}}, "weight_cap has no effect"),
        ({"cohort": {"quorum": 1}}, "one site's delta alone"),
        ({"data": {"validation_fraction": 0}}, "nothing to evaluate on"),
        ({"adapter": {"kind": "prompt", "dropout": 0.1}, "data": {"packing": False}}, "dropout has no effect"),
        ({"pipeline": [CLIP, NOISE], "algorithm": UNIFORM, "wire": {"max_update_norm": 9}}, "compared with the noised"),
    ],
)
def test_other_advice(changes: dict[str, Any], words: str) -> None:
    assert any(words in warning for warning in warnings(load(changes)))
    assert not any(words in warning for warning in warnings(load({})))


def test_a_plain_plan_gives_no_warning() -> None:
    assert warnings(load({})) == []
