"""FedMeZO, FedKSeed and Ferret: closed forms on quadratics, exact rebuilding, and what their plans may not say."""

import itertools
import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from blake3 import blake3

from fsllm_common import philox
from fsllm_common.algorithms import ADAPTER, Algorithm, Block, LocalRule, Update, algorithm_class, local_rule
from fsllm_common.algorithms.fedkseed import AMPLITUDES, COEFFICIENTS, DRAWS, chances
from fsllm_common.algorithms.seeds import Directions, Rebuilt, digest, units
from fsllm_common.errors import PlanInvalid, TrainingFailed
from fsllm_common.plan import Plan, plan_from_json

Arrays = dict[str, npt.NDArray[np.float32]]
Tensors = dict[str, torch.Tensor]

RATE = 0.001
A, B = "layers.0.q_proj.lora_A.weight", "layers.0.q_proj.lora_B.weight"
SHAPES = {A: (4, 60), B: (50, 4)}


def plan(name: str, parameters: dict[str, Any] | None = None, **sections: dict[str, Any]) -> Plan:
    raw: dict[str, Any] = {
        "name": "p",
        "seed": 5,
        "rounds": 3,
        "model": {"name": "m"},
        "algorithm": {"name": name, "parameters": parameters or {}, "weighting": "examples"},
        "train": {"optimizer": "sgd", "max_grad_norm": 0, "learning_rate": RATE},
    }
    return plan_from_json(json.dumps(raw | {key: raw.get(key, {}) | value for key, value in sections.items()}).encode())


class Quadratic:
    """A step on 1/2 |w - m|^2."""

    def __init__(self, at: Tensors, minimum: Tensors) -> None:
        self.at = dict(at)
        self.minimum = minimum
        self.number = 0
        self.learning_rate = RATE

    def values(self) -> Tensors:
        return {name: value.clone() for name, value in self.at.items()}

    def write(self, values: Mapping[str, torch.Tensor]) -> None:
        self.at |= values

    def loss(self) -> float:
        return sum(float((value.double() - self.minimum[name]).square().sum() / 2) for name, value in self.at.items())

    def gradients(self) -> Tensors:
        return {name: value - self.minimum[name] for name, value in self.at.items()}

    def step(self) -> None:
        self.at = {name: value - RATE * (value - self.minimum[name]) for name, value in self.at.items()}

    def gradient_of(self, tensor: torch.Tensor) -> torch.Tensor:
        raise AssertionError


def made(seed: int, scale: float = 1.0) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {name: scale * torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def version_zero(of: Plan) -> Arrays:
    added = algorithm_class(of.algorithm.name)(of).extra(SHAPES)  # noqa: S610 (no database)
    return {**{name: tensor.numpy() for name, tensor in made(0, 0.1).items()}, **added}


class Site:
    """A site on a quadratic of its own."""

    def __init__(self, of: Plan, number: int) -> None:
        self.plan = of
        self.number = number
        self.minimum = made(100 + number)
        self.left: Tensors = {}

    def rule(self, round_: int, version: Arrays) -> tuple[LocalRule, Tensors]:
        rule = local_rule(self.plan)
        rule.site, rule.round, rule.trained = self.number, round_, sorted(SHAPES)
        tensors = {name: torch.from_numpy(array) for name, array in version.items()}
        base = {name: tensors[name] for name in SHAPES}
        rule.receive(base, {name: tensor for name, tensor in tensors.items() if name not in SHAPES})
        return rule, base

    def train(self, round_: int, version: Arrays, steps: int = 6) -> Arrays:
        rule, base = self.rule(round_, version)
        turns = rule.turns(base, steps)
        turn = next(turns)
        step = Quadratic(turn.start, self.minimum)
        for number in range(1, turn.steps + 1):
            step.number = number
            rule.take_step(step)
        with pytest.raises(StopIteration) as end:
            turns.send(step.values())
        self.left = end.value.value
        moving = algorithm_class(self.plan.algorithm.name)(self.plan).moving(round_)
        sent = {name: self.left[name] - base[name] for name in base} if ADAPTER in moving else {}
        return {name: tensor.numpy() for name, tensor in rule.produce(sent).items()}


def serve(algorithm: Algorithm, round_: int, version: Arrays, uploads: list[Arrays], examples: list[int]) -> Arrays:
    shares = algorithm.weigh([Update(str(n), count, 1, 1) for n, count in enumerate(examples)])
    made = dict(version)
    for name in uploads[0]:
        zero = np.zeros_like(version[name])
        mean = sum((np.float32(s) * upload[name] for s, upload in zip(shares, uploads, strict=True)), zero)
        made[name] = algorithm.apply(Block(round_, version[name], mean, {}, updates=len(uploads)))
    return made


# FedMeZO.


def test_mezos_step_is_along_its_direction_by_the_losses_slope_and_on_average_a_gradient_step() -> None:
    """Of a quadratic the two losses give the slope exactly: rho = z . g."""
    of = plan("fedmezo", {"eps": 0.01})
    at, site = made(1), Site(of, 3)
    gradient = {name: at[name] - site.minimum[name] for name in at}
    rule = site.rule(1, version_zero(of))[0]
    means = {name: torch.zeros_like(value) for name, value in at.items()}
    count = 800
    for number in range(1, count + 1):
        step = Quadratic(at, site.minimum)
        step.number = number
        rule.take_step(step)
        moved = {name: step.at[name] - at[name] for name in at}
        if number == 1:
            z = {name: torch.sign(-moved[name]) for name in at}
            rho = sum(float((z[name] * gradient[name]).sum()) for name in at)
            for name in at:
                torch.testing.assert_close(moved[name], -RATE * rho * z[name], rtol=1e-3, atol=1e-5)
        for name in at:
            means[name] += moved[name] / count
    size = sum(float(g.square().sum()) for g in gradient.values())
    along = sum(float((means[name] * gradient[name]).sum()) for name in at) / size
    assert along == pytest.approx(-RATE, rel=0.2)  # its deviation is sqrt(2 / count) of it
    away = {name: means[name] - along * gradient[name] for name in at}
    # Whatever is left over is the average of so many random directions.
    elements = sum(g.numel() for g in gradient.values())
    assert sum(float(v.square().sum()) for v in away.values()) < 1.3 * RATE**2 * size * elements / count


def test_each_site_round_and_step_has_its_own_direction() -> None:
    of = plan("fedmezo")
    seen = set()
    for site, round_, number in itertools.product((1, 2), (1, 2), (1, 2)):
        rule = Site(of, site).rule(round_, version_zero(of))[0]
        step = Quadratic(made(1), made(2))
        step.number = number
        rule.take_step(step)
        seen.add(tuple(torch.sign(step.at[A] - made(1)[A])[0].tolist()))
        seen.add(tuple((-torch.sign(step.at[A] - made(1)[A]))[0].tolist()))
    assert len(seen) == 16


# FedKSeed.


@pytest.mark.parametrize("seeds", [1, 3, 500])
def test_what_one_site_has_trained_is_what_all_rebuild_bit_for_bit(seeds: int) -> None:
    of = plan("fedkseed", {"seeds": seeds, "eps": 0.01})
    algorithm, site, version = algorithm_class("fedkseed")(of), Site(of, 1), version_zero(of)
    assert isinstance(algorithm, Rebuilt)
    zero = dict(version)
    for number in (1, 2, 3):
        upload = site.train(number, version)
        assert upload.keys() == {COEFFICIENTS}
        assert upload[COEFFICIENTS].shape == (seeds,)
        assert 0 < np.count_nonzero(upload[COEFFICIENTS]) <= 6
        version = serve(algorithm, number, version, [upload], [17])
        rebuilt = algorithm.exported(version)
        for name in SHAPES:
            assert version[name] is zero[name]
            assert np.abs(rebuilt[name] - zero[name]).max() > 1e-3
            assert rebuilt[name].tobytes() == site.left[name].numpy().tobytes(), (number, name)
        rule, base = site.rule(number + 1, version)
        assert rule.model_digest == digest(rebuilt)
        evaluated = rule.evaluated(base, {COEFFICIENTS: torch.from_numpy(version[COEFFICIENTS])})
        assert all(torch.equal(evaluated[name], site.left[name]) for name in SHAPES)


def test_two_sites_make_their_weighted_mean_however_many_sites_there_are() -> None:
    """Added up without weights, the step would grow with the sites: with two of the same, it would double."""
    of = plan("fedkseed", {"seeds": 400, "eps": 0.01})
    algorithm, version = algorithm_class("fedkseed")(of), version_zero(of)
    assert isinstance(algorithm, Rebuilt)
    sites = [Site(of, 1), Site(of, 2)]
    uploads = [site.train(1, version) for site in sites]
    rebuilt = algorithm.exported(serve(algorithm, 1, version, uploads, [30, 10]))
    for name in SHAPES:
        expected = 0.75 * sites[0].left[name].numpy() + 0.25 * sites[1].left[name].numpy()
        np.testing.assert_allclose(rebuilt[name], expected, atol=1e-6)
    alone = serve(algorithm, 1, version, uploads[:1], [30])
    many = serve(algorithm, 1, version, uploads[:1] * 4, [30, 30, 30, 30])
    assert np.array_equal(alone[COEFFICIENTS], many[COEFFICIENTS])


def test_pro_draws_the_seeds_whose_losses_differ_most_and_learns_which_from_all_sites() -> None:
    of = plan("fedkseed", {"seeds": 3, "eps": 0.01, "draw": "amplitude"})
    algorithm, version = algorithm_class("fedkseed")(of), version_zero(of)
    assert set(version) - set(SHAPES) == {COEFFICIENTS, AMPLITUDES, DRAWS}
    sites = [Site(of, 1), Site(of, 2)]
    uploads = [site.train(1, version, steps=60) for site in sites]
    for upload in uploads:
        assert upload[DRAWS].sum() == 60
        assert (upload[DRAWS] > 8).all()  # all are as likely at first
        assert (upload[AMPLITUDES] >= np.abs(upload[COEFFICIENTS])).all()
    version = serve(algorithm, 1, version, uploads, [30, 10])
    np.testing.assert_allclose(version[DRAWS], 0.75 * uploads[0][DRAWS] + 0.25 * uploads[1][DRAWS], rtol=1e-6)
    means = version[AMPLITUDES] / version[DRAWS]
    brought = (means - means.min()) / (means.max() - means.min())
    expected = np.exp(brought) / np.exp(brought).sum()
    again = sites[0].train(2, version, steps=3000)[DRAWS] / 3000
    assert again == pytest.approx(expected, abs=5 * 0.5 / math.sqrt(3000))  # five standard deviations, at most
    assert expected.max() / expected.min() == pytest.approx(math.e)


def test_pros_chances_by_hand() -> None:
    some = np.array([30.0, 0.0, 2.0, 8.0], np.float32), np.array([2.0, 0.0, 1.0, 0.8], np.float32)
    # Means of 15, none yet, 2 and 10.
    weights = np.exp([1.0, 0.0, 2 / 15, 10 / 15])
    np.testing.assert_allclose(chances(*some), weights / weights.sum(), rtol=1e-6)
    assert chances(np.zeros(4, np.float32), np.zeros(4, np.float32)).tolist() == [0.25] * 4


def test_one_accident_is_not_all_that_counts() -> None:
    of = plan("fedkseed", {"seeds": 1, "eps": 0.01, "draw": "amplitude"})
    rule, base = Site(of, 1).rule(1, version_zero(of))
    step = Quadratic(base, {name: 1e4 * value for name, value in made(101).items()})
    rule.take_step(step)
    sent = rule.produce({})
    assert abs(float(sent[COEFFICIENTS][0])) > 1000
    assert float(sent[AMPLITUDES][0]) == 1000.0


def test_the_rebuilt_bits_are_those_of_torch_in_any_order() -> None:
    of = plan("fedkseed", {"seeds": 64})
    algorithm, version = algorithm_class("fedkseed")(of), version_zero(of)
    assert isinstance(algorithm, Rebuilt)
    version[COEFFICIENTS] = (100 * np.random.default_rng(1).standard_normal(64)).astype(np.float32)
    rebuilt = algorithm.exported(version)
    for name, shape in SHAPES.items():
        counters, stream = torch.arange(2), philox.stream(name)
        value = torch.from_numpy(version[name]).double()
        for j in reversed(range(64)):
            index = (counters, counters * 0, torch.tensor([stream & 0xFFFFFFFF]), torch.tensor([stream >> 32]))
            drawn = torch.stack(philox.philox4x32(index, (torch.tensor([j]), torch.tensor([5]))), dim=1)
            signs = (2 * (drawn[:, :, None] >> torch.arange(32) & 1) - 1).flatten()[: value.numel()]
            step = torch.round(-RATE * torch.tensor(version[COEFFICIENTS][j]).double() * 2.0**44) * 2.0**-44
            total = step * signs if j == 63 else total + step * signs  # noqa: F821 (the loop's own)
        assert torch.equal((value + total.reshape(shape)).float(), torch.from_numpy(rebuilt[name]))


def test_the_digest_is_of_names_and_float32_bytes_in_order() -> None:
    one, two = np.ones((2, 1), np.float32), np.zeros(3, np.float32)
    expected = blake3(b"a\n" + one.tobytes() + b"b\n" + two.tobytes()).digest()
    assert digest({"b": two, "a": one}) == expected


def test_lora_xs_rebuilds_what_it_trains_alone() -> None:
    of = plan("fedkseed", {"seeds": 4}, adapter={"kind": "lora-xs"})
    algorithm = algorithm_class("fedkseed")(of)
    assert isinstance(algorithm, Rebuilt)
    names = [A, B, "layers.0.q_proj.lora_R.weight", COEFFICIENTS]
    assert algorithm.moves(names) == ["layers.0.q_proj.lora_R.weight"]


def test_sums_are_exact_or_refused() -> None:
    some = Directions(np.arange(300), 9)
    steps = np.random.default_rng(0).integers(-(2**38), 2**38, 300).astype(np.float64)
    steps[::3] = 0
    signs = np.stack([philox.signs((70_001,), key, 9) for key in range(300)])
    exact = [sum(int(s) * int(z) for s, z in zip(steps, signs[:, at], strict=True)) for at in (0, 40_000, 70_000)]
    found = some.sum(steps, 70_001)
    assert [found[0], found[40_000], found[70_000]] == exact
    values = np.random.default_rng(0).standard_normal(70_001).astype(np.float32)
    np.testing.assert_allclose(some.products(values), signs.astype(np.float64) @ values, atol=1e-6)
    for bad in (1e3, np.inf, np.nan):
        with pytest.raises(TrainingFailed, match="beyond all measure"):
            units(np.array([bad]))


# Ferret.


def test_ferrets_coordinates_are_of_the_paper_and_give_the_delta_on_average() -> None:
    of = plan("ferret", {"coordinates": 110})
    algorithm, site, version = algorithm_class("ferret")(of), Site(of, 1), version_zero(of)
    assert isinstance(algorithm, Rebuilt)
    upload = site.train(2, version)
    (coordinates,) = upload.values()
    assert list(upload) == ["scalars/00002"]
    assert coordinates.shape == (110,)
    delta = {name: site.left[name].double().numpy() - version[name] for name in SHAPES}
    rebuilt = algorithm.exported(serve(algorithm, 2, version, [upload], [1]))
    at = 0
    for name, shape in SHAPES.items():
        size, count = delta[name].size, {A: 60, B: 50}[name]
        stream = philox.stream(f"2/{name}")
        # The paper's: v of norm 1 with E[v v^T] = rho I, coordinates V^T delta / (rho K), and V times those.
        v = np.stack([philox.signs((size,), j + (5 << 32), stream) for j in range(count)]).T / size**0.5
        rho = 1 / size
        gamma = v.T @ delta[name].ravel() / (rho * count)
        np.testing.assert_allclose(coordinates[at : at + count], gamma / size**0.5, rtol=1e-4, atol=1e-8)
        np.testing.assert_allclose(rebuilt[name], version[name] + (v @ gamma).reshape(shape), atol=1e-6)
        at += count

    bases = [Directions(np.arange(20_000), philox.stream("x"))]
    back = bases[0].sum(bases[0].products(delta[A].astype(np.float32)) / 20_000, delta[A].size)
    assert np.linalg.norm(back - delta[A].ravel()) < 0.15 * np.linalg.norm(delta[A])  # sqrt(240 / 20000) of it


def test_ferrets_rounds_add_up_and_sites_are_weighed() -> None:
    of = plan("ferret", {"coordinates": 100})
    algorithm, version = algorithm_class("ferret")(of), version_zero(of)
    assert isinstance(algorithm, Rebuilt)
    assert {name for name in version if "/" in name} == {f"scalars/0000{n}" for n in (1, 2, 3)}
    sites = [Site(of, 1), Site(of, 2)]
    before = algorithm.exported(version)
    assert all(np.array_equal(before[name], version[name]) for name in SHAPES)
    for number in (1, 2):
        assert algorithm.moving(number) == (f"scalars/0000{number}",)
        assert algorithm.trained(number) == (ADAPTER,)
        uploads = [site.train(number, version) for site in sites]
        apart = [algorithm.exported(serve(algorithm, number, version, [upload], [1])) for upload in uploads]
        version = serve(algorithm, number, version, uploads, [3, 1])
        rebuilt = algorithm.exported(version)
        for name in SHAPES:
            np.testing.assert_allclose(rebuilt[name], 0.75 * apart[0][name] + 0.25 * apart[1][name], atol=1e-6)
            assert np.abs(rebuilt[name] - before[name]).max() > 1e-4
        before = rebuilt
    (late, _), (early, _) = sites[1].rule(3, version), sites[0].rule(3, version)
    assert late.model_digest == early.model_digest == digest(before)


def test_a_long_run_of_ferret_stays_exact_and_only_what_is_not_is_refused() -> None:
    """What is added up at once is a tensor's round; all rounds of all tensors together may be as much as they like."""
    of = plan("ferret", {"coordinates": 100}).model_copy(update={"rounds": 400})
    algorithm, version = algorithm_class("ferret")(of), version_zero(of)
    assert isinstance(algorithm, Rebuilt)
    signs = np.random.default_rng(3)
    for number in range(1, 401):
        version[f"scalars/{number:05d}"] = signs.choice([-0.03, 0.03], 99).astype(np.float32)
    assert sum(np.abs(version[name]).sum() for name in version if "/" in name) > 1000
    far = algorithm.distances(version)
    counts = {A: (0, 54), B: (54, 99)}
    for name, (start, end) in counts.items():
        exact = 0
        for number in range(1, 401):
            row = np.rint(version[f"scalars/{number:05d}"][start:end].astype(np.float64) * 2**44)
            keys = range(5 << 32, (5 << 32) + end - start)
            first = [philox.signs((1,), key, philox.stream(f"{number}/{name}"))[0] for key in keys]
            exact += sum(int(c) * int(z) for c, z in zip(row, first, strict=True))
        assert far[name].ravel()[0] == exact
    for bad in (3.0, np.inf, np.nan):  # of 54 coordinates of one tensor
        version["scalars/00007"][:54] = bad
        with pytest.raises(TrainingFailed, match="beyond all measure"):
            algorithm.distances(version)
    for number in range(1, 401):  # each round's sum is exact; the element's is not
        version[f"scalars/{number:05d}"][:] = 0
        version[f"scalars/{number:05d}"][0] = philox.signs((1,), 5 << 32, philox.stream(f"{number}/{A}"))[0]
    with pytest.raises(TrainingFailed, match="beyond all measure"):
        algorithm.distances(version)


def test_every_tensor_has_a_coordinate_and_none_more_than_elements() -> None:
    algorithm = algorithm_class("ferret")(plan("ferret", {"coordinates": 10}))
    assert algorithm.counts({"b": 3, "a": 9000}) == {"a": 9, "b": 1}  # type: ignore[attr-defined]
    algorithm = algorithm_class("ferret")(plan("ferret", {"coordinates": 10_000}))
    assert algorithm.counts({"b": 3, "a": 9}) == {"a": 9, "b": 3}  # type: ignore[attr-defined]


# What a plan may not say.


@pytest.mark.parametrize(
    ("name", "sections", "why"),
    [
        ("fedkseed", {"train": {"schedule": "cosine"}}, "one learning rate"),
        ("fedkseed", {"train": {"warmup_rounds": 1}}, "one learning rate"),
        ("fedkseed", {"train": {"weight_decay": 0.1}}, "plain gradient steps"),
        ("fedkseed", {"train": {"optimizer": "adamw"}}, "plain gradient steps"),
        ("fedmezo", {"train": {"max_grad_norm": 1}}, "plain gradient steps"),
        ("ferret", {"cohort": {"buffer": {"size": 2}}}, "rounds build on each other"),
    ],
)
def test_what_would_be_another_method_is_refused(name: str, sections: dict[str, Any], why: str) -> None:
    base = plan(name).model_dump(mode="json")
    train = {"optimizer": "sgd", "max_grad_norm": 0, "learning_rate": RATE} | sections.get("train", {})
    raw = {key: base[key] for key in ("name", "rounds", "model", "algorithm")} | sections | {"train": train}
    with pytest.raises(PlanInvalid, match=why):
        plan_from_json(json.dumps(raw).encode())


@pytest.mark.parametrize("name", ["fedmezo", "fedkseed", "ferret"])
def test_evaluators_can_measure_them_too(name: str) -> None:
    assert not algorithm_class(name)(plan(name)).personalised
