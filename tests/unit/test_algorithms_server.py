"""The server's steps against torch's optimizers and closed forms, in rounds of one block."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from fsllm_common.algorithms import Algorithm, Block, algorithm_class
from fsllm_common.errors import PlanInvalid
from fsllm_common.plan import Plan, canonical_json, plan_from_json

Array = npt.NDArray[np.float32]
ROUNDS = 7
ZERO = np.zeros(3, np.float32)


def plan(name: str, rate: float | None = None, **parameters: Any) -> Plan:  # noqa: ANN401
    raw = {"name": "p", "model": {"name": "m"}, "algorithm": {"name": name, "parameters": parameters}}
    if rate is not None:
        raw["algorithm"]["server_learning_rate"] = rate  # type: ignore[index]
    return plan_from_json(json.dumps(raw).encode())


def play(plan: Plan, base: Array, means: Sequence[Array]) -> list[Array]:
    """Return the versions that these mean deltas make, one after the other."""
    algorithm: Algorithm = algorithm_class(plan.algorithm.name)(plan)
    state = {name: np.full_like(base, value) for name, value in algorithm.state().items()}
    versions = []
    for round_, mean in enumerate(means, start=1):
        before = base.copy(), mean.copy()
        after = algorithm.apply(Block(round_, base, mean, state))
        assert after.dtype == np.float32
        assert np.array_equal(base, before[0])
        assert np.array_equal(mean, before[1])
        versions.append(base := after)
    return versions


def deltas(seed: int = 0) -> tuple[Array, list[Array]]:
    generator = np.random.default_rng(seed)
    return (
        generator.standard_normal(50, dtype=np.float32),
        [generator.standard_normal(50, dtype=np.float32) * np.float32(0.1) for _ in range(ROUNDS)],
    )


def by_torch(make: Any, base: Array, means: Sequence[Array]) -> list[Array]:  # noqa: ANN401
    """Return the versions of a torch optimizer for which each mean delta is a step down the gradient."""
    value = torch.nn.Parameter(torch.from_numpy(base.copy()))
    optimizer = make([value])
    versions = []
    for mean in means:
        value.grad = -torch.from_numpy(mean)
        optimizer.step()
        versions.append(value.detach().numpy().copy())
    return versions


@pytest.mark.parametrize(
    ("name", "rate", "parameters", "make"),
    [
        ("fedavg", 0.7, {}, lambda p: torch.optim.SGD(p, lr=0.7)),
        ("fedavgm", 0.5, {"momentum": 0.8}, lambda p: torch.optim.SGD(p, lr=0.5, momentum=0.8)),
        (
            "fedavgm",
            0.5,
            {"momentum": 0.8, "nesterov": True},
            lambda p: torch.optim.SGD(p, lr=0.5, momentum=0.8, nesterov=True),
        ),
        (
            "fedadam",
            0.1,
            {"beta1": 0.8, "beta2": 0.95, "tau": 1e-2, "bias_correction": True},
            lambda p: torch.optim.Adam(p, lr=0.1, betas=(0.8, 0.95), eps=1e-2),
        ),
        (
            "fedadagrad",
            0.1,
            {"tau": 1e-2},
            lambda p: torch.optim.Adagrad(p, lr=0.1, initial_accumulator_value=1e-4, eps=1e-2),
        ),
    ],
)
def test_the_steps_are_those_of_torchs_optimizers(
    name: str,
    rate: float,
    parameters: dict[str, Any],
    make: Any,  # noqa: ANN401
) -> None:
    base, means = deltas()
    ours = play(plan(name, rate, **parameters), base, means)
    for got, wanted in zip(ours, by_torch(make, base, means), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=2e-5, atol=2e-6)


def test_fedadam_as_the_paper_has_it() -> None:
    """Without bias correction, v from tau^2; on a constant delta both moments have a closed form."""
    beta1, beta2, tau, rate, d = 0.9, 0.99, 1e-2, 0.1, 0.05
    got = play(
        plan("fedadam", rate, beta1=beta1, beta2=beta2, tau=tau),
        np.zeros(3, np.float32),
        [np.full(3, d, np.float32)] * 5,
    )
    x = 0.0
    for t, version in enumerate(got, start=1):
        first = d * (1 - beta1**t)
        # Of the square of the delta, not of the momentum's (a defect of OpenFedLLM's).
        second = beta2**t * tau**2 + (1 - beta2**t) * d**2
        x += rate * first / (second**0.5 + tau)
        np.testing.assert_allclose(version, x, rtol=1e-5)


def test_fedyogi_grows_by_its_share_of_the_square_until_it_is_there() -> None:
    beta2, tau, rate, d = 0.9, 1e-3, 0.1, 0.1
    got = play(
        plan("fedyogi", rate, beta1=0.0, beta2=beta2, tau=tau), np.zeros(3, np.float32), [np.full(3, d, np.float32)] * 5
    )
    x = 0.0
    for t, version in enumerate(got, start=1):
        second = tau**2 + t * (1 - beta2) * d**2
        x += rate * d / (second**0.5 + tau)
        np.testing.assert_allclose(version, x, rtol=1e-5)
    # And a small delta after large ones lets it forget by its own share, not by the large ones'.
    down = play(
        plan("fedyogi", 1.0, beta1=0.0, beta2=beta2, tau=1e-3),
        np.zeros(1, np.float32),
        [np.full(1, 1.0, np.float32), np.full(1, 0.1, np.float32)],
    )
    second = 1e-6 + 0.1 * 1.0 - 0.1 * 0.01
    np.testing.assert_allclose(down[1] - down[0], 0.1 / (second**0.5 + 1e-3), rtol=1e-5)


@pytest.mark.parametrize("name", ["fedyogi", "fedadagrad"])
def test_the_second_moment_is_of_the_delta_not_of_the_first_moment(name: str) -> None:
    """Of a constant delta, as above; the square of the momentum instead is a defect of OpenFedLLM's."""
    beta1, tau, rate, d = 0.8, 1e-3, 0.1, 0.1
    more = {"beta2": 0.9} if name == "fedyogi" else {}
    got = play(plan(name, rate, beta1=beta1, tau=tau, **more), np.zeros(3, np.float32), [np.full(3, d, np.float32)] * 5)
    x = 0.0
    for t, version in enumerate(got, start=1):
        second = tau**2 + t * d**2 * (0.1 if name == "fedyogi" else 1.0)
        x += rate * d * (1 - beta1**t) / (second**0.5 + tau)
        np.testing.assert_allclose(version, x, rtol=1e-5)


def test_momentum_begins_with_the_whole_delta() -> None:
    """Not with (1 - beta) of it: an average of deltas is no momentum (a defect of OpenFedLLM's)."""
    base, means = deltas()
    np.testing.assert_allclose(play(plan("fedavgm"), base, means)[0], base + means[0], rtol=1e-6)


def test_a_plan_holds_every_parameter_and_refuses_others() -> None:
    whole = plan("fedadam", tau=0.5)
    assert whole.algorithm.parameters == {"beta1": 0.9, "beta2": 0.99, "tau": 0.5, "bias_correction": False}
    assert whole.algorithm.server_learning_rate == 0.01
    assert plan("fedavg").algorithm.server_learning_rate == 1.0
    assert plan_from_json(canonical_json(whole)) == whole
    with pytest.raises(PlanInvalid, match=r"algorithm.parameters.beta3: unknown key; did you mean 'beta2'"):
        plan("fedadam", beta3=1)
    with pytest.raises(PlanInvalid, match=r"algorithm.parameters.momentum: .*less than 1 \(got 1.5\)"):
        plan("fedavgm", momentum=1.5)
    with pytest.raises(PlanInvalid, match="mu: unknown key; known: none"):
        plan("fedavg", mu=1)
