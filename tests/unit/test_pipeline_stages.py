import math
from typing import get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from pydantic import TypeAdapter

from fsllm.v1.tensors_pb2 import ELEMENT_TYPE_BFLOAT16, ELEMENT_TYPE_FLOAT16, ELEMENT_TYPE_FLOAT32
from fsllm_common.errors import FsllmError, PlanInvalid
from fsllm_common.pipeline import ClipStage, Facts, NoiseStage, apply_client, build, largest_norm
from fsllm_common.plan.schema import Clip, Noise, Plan, Stage
from fsllm_common.tensors.arrays import narrow
from fsllm_common.tensors.arrays import norm as norm_of

Delta = dict[str, np.ndarray]

values = st.floats(-(2.0**100), 2.0**100, width=32)
deltas = st.dictionaries(
    st.text(max_size=5),
    hnp.arrays(np.float32, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=6), elements=values),
    max_size=4,
)
norms = st.floats(1e-6, 1e6)


def exact_norm(delta: Delta) -> float:
    """The norm by another route: exact sums of Python floats."""
    return math.sqrt(math.fsum(float(v) ** 2 for array in delta.values() for v in array.reshape(-1)))


def plan(*stages: Clip | Noise, **wire: object) -> Plan:
    return Plan.model_validate(
        {
            "name": "p",
            "model": {"name": "synthetic"},
            "algorithm": {"name": "noop", "weighting": "uniform"},
            "pipeline": [s.model_dump() for s in stages],
            "wire": wire,
        }
    )


@given(deltas, norms)
def test_after_the_clip_the_norm_is_never_larger(delta: Delta, limit: float) -> None:
    before = exact_norm(delta)
    changed, facts = apply_client([ClipStage(Clip(norm=limit))], delta)
    assert exact_norm(changed) <= limit * (1 + 1e-12)
    assert facts.norm == pytest.approx(before, rel=1e-9)
    assert facts.clipped == (before > limit) or before == pytest.approx(limit, rel=1e-12)


@given(deltas, norms)
def test_the_clip_keeps_the_direction_and_all_of_the_norm(delta: Delta, limit: float) -> None:
    before = exact_norm(delta)
    original = {name: array.astype(np.float64) for name, array in delta.items()}
    changed, facts = apply_client([ClipStage(Clip(norm=limit))], delta)
    if facts.clipped:
        for name, array in changed.items():
            # Absolute: what becomes subnormal in float32 loses digits.
            np.testing.assert_allclose(array, original[name] * (limit / before), rtol=1e-6, atol=1e-37)


@given(deltas)
def test_below_the_norm_every_bit_stays(delta: Delta) -> None:
    copies = {name: array.copy() for name, array in delta.items()}
    _, facts = apply_client([ClipStage(Clip(norm=exact_norm(delta) * 1.001 + 1e-300))], delta)
    assert not facts.clipped
    for name, array in delta.items():
        assert array.tobytes() == copies[name].tobytes()


def test_the_clip_is_over_all_tensors_and_in_place() -> None:
    delta = {"a": np.full((2, 2), 3.0, np.float32), "b": np.full((4,), 4.0, np.float32)}
    held = delta["a"]
    changed, facts = apply_client([ClipStage(Clip(norm=1.0))], delta)
    assert facts.norm == 10.0
    assert changed["a"] is held
    np.testing.assert_allclose(held, 0.3, rtol=1e-6)
    np.testing.assert_allclose(changed["b"], 0.4, rtol=1e-6)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_the_clip_refuses_what_is_not_finite(value: float) -> None:
    with pytest.raises(FsllmError) as caught:
        apply_client([ClipStage(Clip(norm=1.0))], {"a": np.array([1, value], np.float32)})
    assert caught.value.reason == "NOT_FINITE"


def noise_stage(multiplier: float, norm: float, seed: int | None) -> NoiseStage:
    generator = None if seed is None else np.random.default_rng(seed)
    return NoiseStage(Noise(multiplier=multiplier), Clip(norm=norm), generator)


@pytest.mark.parametrize("shape", [(200_000,), (400, 500), (2, 3, 33_333)])
def test_the_noise_has_the_stated_deviation_and_no_mean(shape: tuple[int, ...]) -> None:
    deviation = 0.7 * 3.0
    delta = {"x": np.full(shape, 5.0, np.float32)}
    apply_client([noise_stage(0.7, 3.0, seed=1)], delta)
    noise = (delta["x"].astype(np.float64) - 5.0).reshape(-1) / deviation
    n = noise.size
    # A chi-square of n degrees is within n +- 5 sqrt(2n), and a mean within 5 / sqrt(n), but for 1 draw in 10^6.
    assert abs(np.sum(noise**2) - n) < 5 * math.sqrt(2 * n)
    assert abs(noise.mean()) < 5 / math.sqrt(n)
    # Gaussian, not merely of that variance: the fourth moment is 3, with variance 96 / n.
    assert abs(np.mean(noise**4) - 3) < 5 * math.sqrt(96 / n)
    # Neighbours are independent, across the edges of blocks too.
    assert abs(np.mean(noise[:-1] * noise[1:])) < 5 / math.sqrt(n)


def test_noise_reaches_every_tensor_in_any_layout() -> None:
    transposed = np.zeros((50, 70), np.float32).T
    strided = np.zeros((100,), np.float32)[::2]
    delta = {"t": transposed, "s": strided, "scalar": np.zeros((), np.float32), "none": np.zeros((0, 3), np.float32)}
    apply_client([noise_stage(1.0, 1.0, seed=3)], delta)
    assert np.count_nonzero(transposed) == transposed.size
    assert np.count_nonzero(strided) == strided.size
    assert delta["scalar"] != 0
    everything = np.concatenate([array.reshape(-1) for array in delta.values()])
    assert np.unique(everything).size == everything.size


def test_noise_is_fresh_in_every_call_and_stage() -> None:
    drawn = []
    for stage in (noise_stage(1.0, 1.0, seed=None),) * 2 + (noise_stage(1.0, 1.0, seed=None),):
        delta = {"x": np.zeros(100, np.float32)}
        apply_client([stage], delta)
        drawn.append(delta["x"])
    for first, second in ((0, 1), (0, 2), (1, 2)):
        assert not np.any(drawn[first] == drawn[second])


def test_with_noise_nothing_that_depends_on_the_data_is_told() -> None:
    clip, noise = Clip(norm=2.0), Noise(multiplier=0.5)
    told = []
    for size in (0.1, 100.0):
        _, facts = apply_client(build(plan(clip, noise)), {"x": np.full(4, size, np.float32)})
        told.append(facts.metrics())
    assert told[0] == told[1] == {"clip_norm": 2.0, "noise_deviation": 1.0}
    _, facts = apply_client(build(plan(clip)), {"x": np.full(4, 100.0, np.float32)})
    assert facts.metrics() == {"clip_norm": 2.0, "delta_norm": 200.0, "clipped": 1.0}
    assert Facts().metrics() == {}


def test_every_stage_of_the_schema_is_built_in_the_plans_order() -> None:
    kinds = get_args(get_args(Stage)[0])
    configs: dict[str, Clip | Noise] = {"clip": Clip(norm=1.0), "noise": Noise(multiplier=1.0)}
    assert {kind.model_fields["stage"].default for kind in kinds} == set(configs)
    stages = build(plan(configs["clip"], configs["noise"]))
    assert [stage.name for stage in stages] == ["clip", "noise"]
    assert TypeAdapter(Stage).validate_python({"stage": "clip", "norm": 1}) == configs["clip"]
    assert build(plan()) == []
    with pytest.raises(PlanInvalid, match="without a clip"):
        build(plan(configs["noise"]))


@pytest.mark.parametrize("kind", ["fp32", "bf16", "fp16"])
@given(
    delta=hnp.arrays(np.float32, st.integers(1, 300), elements=st.floats(-1e4, 1e4, width=32)),
    limit=st.floats(1e-7, 1e4),
)
def test_an_honest_clipped_update_passes_the_servers_bound_on_the_wire(
    kind: str, delta: np.ndarray, limit: float
) -> None:
    clipped, _ = apply_client(build(plan(Clip(norm=limit))), {"x": delta})
    types = {"fp32": ELEMENT_TYPE_FLOAT32, "bf16": ELEMENT_TYPE_BFLOAT16, "fp16": ELEMENT_TYPE_FLOAT16}
    sent = narrow(clipped["x"], types[kind]).astype(np.float32)
    bound = largest_norm(plan(Clip(norm=limit), element_type=kind), delta.size)
    assert bound is not None
    assert norm_of({"x": sent}) <= bound


def test_the_servers_bound_catches_who_does_not_clip() -> None:
    bound = largest_norm(plan(Clip(norm=2.0)), 1000)
    assert bound is not None
    assert 2.0 <= bound < 2.02


def test_the_servers_bound_lets_noise_pass_and_not_much_more() -> None:
    stages = (Clip(norm=1.0), Noise(multiplier=2.0))
    bound = largest_norm(plan(*stages), 10_000)
    assert bound is not None
    assert 200 < bound < 230  # z sqrt(P) = 200
    for _ in range(20):
        noised, _ = apply_client(build(plan(*stages)), {"x": np.ones(10_000, np.float32)})
        assert norm_of(noised) < bound


def test_without_stages_the_plans_bound_or_none() -> None:
    assert largest_norm(plan(), 10) is None
    assert largest_norm(plan(max_update_norm=7.0), 10) == 7.0
    assert largest_norm(plan(Clip(norm=1.0), max_update_norm=7.0), 10) == pytest.approx(1.0, rel=0.01)
