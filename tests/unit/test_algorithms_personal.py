"""The server halves of SCAFFOLD and FedNova, in whole federations on quadratics, and what personal methods declare."""

import json
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from fsllm.v1.tensors_pb2 import TENSOR_ROLE_LORA_A, TENSOR_ROLE_LORA_B, TENSOR_ROLE_MAGNITUDE
from fsllm_common.algorithms import ADAPTER, Algorithm, Block, Update, algorithm_class
from fsllm_common.algorithms.fdlora import search
from fsllm_common.algorithms.fednova import NovaParameters
from fsllm_common.plan import Plan, plan_from_json
from fsllm_common.plan.schema import Adapter, Buffer
from fsllm_server.engine.staleness import discounted
from fsllm_server.engine.state import Update as Recorded
from fsllm_server.engine.state import Version

Array = npt.NDArray[np.float32]
RATE = 0.1

# f_k(x) = h_k/2 (x - m_k)^2, of different curvature, so that the mean of minima is not the minimum of the mean.
CURVATURES = np.array([1.0, 6.0], np.float32)
MINIMA = np.array([-3.0, 2.0], np.float32)
OPTIMUM = float((CURVATURES * MINIMA).sum() / CURVATURES.sum())


def plan(name: str, **parameters: Any) -> Plan:  # noqa: ANN401
    train = {"optimizer": "sgd", "max_grad_norm": 0, "learning_rate": RATE}
    algorithm = {"name": name, "parameters": parameters, "weighting": "uniform"}
    raw = {"name": "p", "model": {"name": "m"}, "algorithm": algorithm, "train": train}
    return plan_from_json(json.dumps({**raw, "cohort": {"sites": ["a", "b"]}}).encode())


def method(name: str, **parameters: Any) -> Algorithm:  # noqa: ANN401
    return algorithm_class(name)(plan(name, **parameters))


def mean_of(algorithm: Algorithm, steps: tuple[int, ...], deltas: list[float]) -> Array:
    shares = algorithm.weigh([Update("m", 1, 1, count) for count in steps])
    return np.array([sum(share * delta for share, delta in zip(shares, deltas, strict=True))], np.float32)


def descend(x: float, site: int, steps: int, correction: float = 0.0) -> float:
    y = x
    for _ in range(steps):
        y -= RATE * (CURVATURES[site] * (y - MINIMA[site]) + correction)
    return float(y)


def federate(name: str, steps: tuple[int, int], rounds: int) -> float:
    """Return where FedAvg, or FedNova, gets to."""
    algorithm = method(name)
    x = np.zeros(1, np.float32)
    for number in range(1, rounds + 1):
        deltas = [descend(float(x[0]), site, steps[site]) - float(x[0]) for site in (0, 1)]
        x = algorithm.apply(Block(number, x, mean_of(algorithm, steps, deltas), {}, updates=2))
    return float(x[0])


def test_scaffold_converges_where_fedavg_drifts() -> None:
    assert abs(federate("fedavg", (10, 10), 300) - OPTIMUM) > 0.3

    algorithm = method("scaffold", estimate="steps")
    assert algorithm.moving(1) == (ADAPTER, "control")
    added = algorithm.extra({"x": (2,)})  # noqa: S610 (no database)
    assert {name: array.tolist() for name, array in added.items()} == {"control/x": [0.0, 0.0]}
    x = c = np.zeros(1, np.float32)
    own = [0.0, 0.0]
    for number in range(1, 301):
        moved, changed = [], []
        for site in (0, 1):
            y = descend(float(x[0]), site, 10, correction=float(c[0]) - own[site])
            fresh = own[site] - float(c[0]) + (float(x[0]) - y) / (10 * RATE)
            moved.append(y - float(x[0]))
            changed.append(fresh - own[site])
            own[site] = fresh
        x = algorithm.apply(Block(number, x, mean_of(algorithm, (10, 10), moved), {}, ADAPTER, 2))
        c = algorithm.apply(Block(number, c, mean_of(algorithm, (10, 10), changed), {}, "control", 2))
    assert float(x[0]) == pytest.approx(OPTIMUM, abs=1e-4)
    assert float(c[0]) == pytest.approx(0.0, abs=1e-4)


def test_scaffold_converges_though_a_site_is_slow_and_its_updates_are_stale() -> None:
    """A version of each update: three of one site's, then one of the other's, which started three versions ago."""
    algorithm = method("scaffold", estimate="steps")
    buffer = Buffer(size=1, weight="constant")
    x = c = np.zeros(1, np.float32)
    versions, own = [(x, c)], [0.0, 0.0]
    for number in range(1, 1201):
        site = 1 if number % 4 == 0 else 0
        started = number - 4 if site else number - 1
        base, all_ = (float(part[0]) for part in versions[started])
        y = descend(base, site, 4, correction=all_ - own[site])
        fresh = own[site] - all_ + (base - y) / (4 * RATE)
        recorded = Recorded("s", started + 1, "", 0, 1, 1, 4)
        (share,) = discounted(buffer, Version(number - 1, ()), [recorded], algorithm.weigh([Update("s", 1, 1, 4)]))
        x = algorithm.apply(Block(number, x, np.array([share * (y - base)], np.float32), {}, ADAPTER, 1))
        changed = np.array([share * (fresh - own[site])], np.float32)
        c = algorithm.apply(Block(number, c, changed, {}, "control", 1))
        own[site] = fresh
        versions.append((x, c))
        assert float(c[0]) == pytest.approx(sum(own) / 2, abs=1e-4)
    assert float(x[0]) == pytest.approx(OPTIMUM, abs=1e-3)


def test_c_moves_by_the_share_of_the_sites_that_took_part() -> None:
    algorithm = method("scaffold", sites=8)
    one = np.ones(3, np.float32)
    assert algorithm.apply(Block(1, one, one, {}, "control", 2)).tolist() == [1.25] * 3
    assert algorithm.apply(Block(1, one, one, {}, ADAPTER, 2)).tolist() == [2.0] * 3
    assert algorithm.weigh([Update("a", 900, 1, 1), Update("b", 100, 1, 1)]) == [0.5, 0.5]


def test_scaffolds_c_is_the_mean_of_all_c_k_again_after_the_server_went_back() -> None:
    algorithm = method("scaffold", estimate="steps")
    c = np.array([0.5], np.float32)  # of round 7
    fresh, changes = [], []
    for own in (4.0, -1.0):  # of round 10
        rule = algorithm.local_rule(algorithm.plan, algorithm.parameters)
        rule.round, rule.trained, rule.learning_rate = 8, ("x",), RATE
        rule.private = {"x": torch.tensor([own]), "round": torch.tensor(10)}
        rule.receive({"x": torch.zeros(1)}, {"control/x": torch.from_numpy(c)})
        driven = rule.turns({"x": torch.zeros(1)}, 10)
        next(driven)
        assert float(rule.after_backward("x", torch.ones(1), torch.zeros(1))) == 1.0, "FedAvg's round"
        changes.append(float(rule.produce({"x": torch.tensor([-0.3 * own])})["control/x"]))
        fresh.append(float(rule.private["x"]))
        assert int(rule.private["round"]) == 8
    assert fresh[0] != fresh[1]
    after = algorithm.apply(Block(8, c, mean_of(algorithm, (10, 10), changes), {}, "control", 2))
    assert float(after[0]) == pytest.approx(sum(fresh) / 2, rel=1e-6)


def test_fednova_stays_with_the_objective_where_the_site_of_more_steps_pulls_fedavg_away(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(globals(), "CURVATURES", np.ones(2, np.float32))
    optimum, steps = MINIMA.mean(), (1, 8)
    # Each site covers this part of its way in a round; the fixed points are means with these weights.
    part = 1 - (1 - RATE) ** np.array(steps)
    averaged, normalised = federate("fedavg", steps, 400), federate("fednova", steps, 400)
    assert averaged == pytest.approx((part * MINIMA).sum() / part.sum(), rel=1e-4)
    assert normalised == pytest.approx((part / steps * MINIMA).sum() / (part / steps).sum(), rel=1e-4)
    assert abs(normalised - optimum) < abs(averaged - optimum) / 4


def test_fednova_weighs_gradients_as_one_step_each_would() -> None:
    """With the gradients held still, whatever the steps, the version moves along the mean gradient alone."""
    gradients = np.array([1.0, -0.5])
    for mu in (0.0, 0.3):
        algorithm = method("fednova", **({"mu": mu} if mu else {}))
        for steps in ((1, 1), (3, 11)):
            deltas = []
            for gradient, count in zip(gradients, steps, strict=True):
                y = 0.0
                for _ in range(count):
                    y -= RATE * (gradient + mu * y)
                deltas.append(y)
            moved = algorithm.apply(Block(1, np.zeros(1, np.float32), mean_of(algorithm, steps, deltas), {}))
            effective = sum(0.5 * ((1 - (1 - RATE * mu) ** n) / (RATE * mu) if mu else n) for n in steps)
            assert float(moved[0]) == pytest.approx(-RATE * effective * gradients.mean(), rel=1e-5)


@pytest.mark.parametrize("pull", [1e-18, 1e-9, 0.5, 1.0, 1.5, 2.0, 2.5])
@pytest.mark.parametrize("steps", [1, 2, 30])
def test_fednovas_norm_is_the_sum_of_the_weights_sizes(pull: float, steps: int) -> None:
    algorithm = method("fednova")
    algorithm.parameters = NovaParameters(mu=pull / RATE)  # a plan may not say 2 / RATE; once it might
    exact = sum(abs(1 - Fraction(RATE) * Fraction(pull / RATE)) ** j for j in range(steps))
    assert algorithm.norm(steps) == pytest.approx(float(exact), rel=1e-12)  # type: ignore[attr-defined]
    assert sum(algorithm.weigh([Update("a", 1, 1, steps), Update("b", 1, 1, 1)])) > 0


def test_a_control_variate_is_of_what_is_trained_alone() -> None:
    asked = plan("scaffold")
    a, b, r = ({f"m.q.lora_{key}.weight": (4, 4)} for key in "ABR")
    assert algorithm_class("scaffold")(asked).extra(a | b).keys() == {f"control/{name}" for name in a | b}  # noqa: S610
    asked = asked.model_copy(update={"adapter": Adapter(kind="lora-xs")})
    assert algorithm_class("scaffold")(asked).extra(a | b | r).keys() == {f"control/{name}" for name in r}  # noqa: S610


def test_methods_with_a_model_of_its_own_at_each_site_say_so() -> None:
    personal = {"ditto", "pfedme", "apfl", "fedper", "fedrep", "fdlora", "fedalt", "fedsa-lora"}
    for name in (*personal, "fedavg", "fedprox", "scaffold", "fednova"):
        assert method(name).personalised == (name in personal), name
        assert method(name).leaves_adapter == (name in personal), name


def test_fedalts_version_is_the_mean_of_the_loras_and_each_site_finds_the_others_in_it() -> None:
    algorithm = method("fedalt")
    added = algorithm.extra({"x": (4,)})  # noqa: S610 (no database)
    assert {name: array.tolist() for name, array in added.items()} == {"scalars/updates": [0.0]}
    assert algorithm.moving(1) == (ADAPTER, "scalars")
    generator = np.random.default_rng(1)
    own = generator.standard_normal((3, 4), dtype=np.float32)
    x = generator.standard_normal(4, dtype=np.float32)
    shares = algorithm.weigh([Update("m", count, 1, 1) for count in (900, 50, 50)])
    mean = np.asarray(sum(share * (lora - x) for share, lora in zip(shares, own, strict=True)), np.float32)
    version = algorithm.apply(Block(1, x, mean, {}, ADAPTER, 3))
    updates = algorithm.apply(Block(1, np.zeros(1, np.float32), np.zeros(1, np.float32), {}, "scalars", 3))
    np.testing.assert_allclose(version, own.mean(axis=0), atol=1e-6)
    assert updates.tolist() == [3.0]

    for site, lora in enumerate(own):
        for last_trained, rest in ((1, np.delete(own, site, axis=0).mean(axis=0)), (0, version)):
            rule = algorithm.local_rule(algorithm.plan, algorithm.parameters)
            rule.round = 2
            rule.private = {"own/x": torch.from_numpy(lora), "round": torch.tensor(last_trained)}
            rule.receive({"x": torch.from_numpy(version)}, {"scalars/updates": torch.from_numpy(updates)})
            assert next(rule.turns({}, 1)).start["x"].tolist() == lora.tolist()
            np.testing.assert_allclose(rule._rest["x"].numpy(), rest, atol=1e-5)
            measured = algorithm.local_rule(algorithm.plan, algorithm.parameters)
            measured.round, measured.private = 2, dict(rule.private)
            found = measured.evaluated({"x": torch.from_numpy(version)}, {"scalars/updates": torch.from_numpy(updates)})
            assert found["x"].tolist() == lora.tolist()
            assert torch.equal(measured._rest["x"], rule._rest["x"]), "measured is what is trained"


@pytest.mark.parametrize("name", ["fedper", "fedrep"])
def test_what_is_personal_is_in_a_part_that_never_moves(name: str) -> None:
    algorithm = method(name, personal="lora_A")
    assert algorithm.personal == {TENSOR_ROLE_LORA_A}
    assert algorithm.part(TENSOR_ROLE_LORA_A) not in algorithm.moving(1)
    assert algorithm.part(TENSOR_ROLE_LORA_B) in algorithm.moving(1)
    assert algorithm.part(TENSOR_ROLE_MAGNITUDE) in algorithm.moving(1)


def test_the_search_finds_a_minimum_off_its_grid_to_its_last_stride() -> None:
    calls = []

    def loss(x: float, y: float) -> float:
        calls.append((x, y))
        return (x - 1.3) ** 2 + 2 * (y + 0.4) ** 2 + 0.5 * x * y

    at = search(loss, (0.5, 0.5), 0.5, 6)
    exact = np.linalg.solve(np.array([[2.0, 0.5], [0.5, 4.0]]), np.array([2.6, -1.6]))
    np.testing.assert_allclose(at, exact, atol=0.5 / 2**5)
    assert len(calls) < 90
