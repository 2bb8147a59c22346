"""FedEx: a step by hand, convergence on a table of losses, what a site draws and sends, and a round for real."""

import json
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from fsllm_client.trainer.group import Group
from fsllm_client.trainer.orders import Build, Evaluate, Prepare, Train
from fsllm_client.trainer.session import Session
from fsllm_client.trainer.tensor_files import read_tensors, write_tensors
from fsllm_common.algorithms import Block, LocalRule, Turn, algorithm_class, local_rule
from fsllm_common.algorithms.fedex import ARMS, LOG_WEIGHTS, DrawnArm, FedEx, factors
from fsllm_common.errors import DataInvalid, PlanInvalid, TrainingFailed
from fsllm_common.plan import Plan, plan_from_json
from fsllm_common.tensors.arrays import encode
from fsllm_common.tensors.manifest import WIRE_TYPES
from fsllm_server.engine.making import Maker
from fsllm_server.engine.memory import recall
from fsllm_server.engine.state import Version
from fsllm_server.reduce.blocks import Source
from fsllm_server.store.blobs import Blobs, StoredVersion

Tensors = dict[str, torch.Tensor]
Array = npt.NDArray[np.float32]

FOUR = {"learning_rates": "0.5,2", "steps": "1,0.3"}


def make_plan(sections: dict[str, Any] | None = None, **parameters: Any) -> Plan:  # noqa: ANN401
    raw = {"name": "p", "seed": 5, "model": {"name": "m"}, "algorithm": {"name": "fedex", "parameters": parameters}}
    return plan_from_json(json.dumps(raw | (sections or {})).encode())


def made(**parameters: Any) -> FedEx:  # noqa: ANN401
    algorithm = algorithm_class("fedex")(make_plan(**parameters))
    assert isinstance(algorithm, FedEx)
    return algorithm


def stepped(algorithm: FedEx, logs: Array, gradient: Array) -> Array:
    return algorithm.apply(Block(1, logs, gradient, {}, ARMS, 3))


# The server.


def test_a_step_by_hand() -> None:
    algorithm = made(learning_rates="1,2,4")
    assert algorithm.moving(1) == ("adapter", ARMS)
    (logs,) = algorithm.extra({}).values()
    assert logs.tolist() == [0.0, 0.0, 0.0]
    first = stepped(algorithm, logs, np.array([-0.3, 0.6, 0.0], np.float32))
    # eta |g| = sqrt(2 ln 3): the step's largest element, whatever the losses' scale.
    eta = math.sqrt(2 * math.log(3)) / 0.6
    np.testing.assert_allclose(first, [0.0, -0.9 * eta, -0.3 * eta], rtol=1e-6)
    assert algorithm.memory == pytest.approx([0.36])
    second = stepped(algorithm, first, np.array([0.8, 0.0, 0.0], np.float32))
    eta = math.sqrt(2 * math.log(3)) / 1.0  # sqrt(0.6^2 + 0.8^2)
    expected = np.array([-0.8 * eta, *first[1:]])
    np.testing.assert_allclose(second, expected - expected.max(), rtol=1e-6)
    # Nobody has learnt anything about any arm.
    assert stepped(made(learning_rates="1,2,4"), first, 0 * first).tolist() == first.tolist()


def test_the_adapter_is_fedavgs() -> None:
    one = np.ones(4, np.float32)
    assert made().apply(Block(1, one, one, {})).tolist() == [2.0] * 4


def test_on_a_table_of_losses_the_best_arm_is_found() -> None:
    """Unbiased estimates, each of one arm: theta ends on the arm of the least loss though most begin on others."""
    table = np.array([0.9, 0.7, 0.4, 0.8])
    algorithm = made(**FOUR)
    random = np.random.default_rng(0)
    logs = np.zeros(4, np.float32)
    for _ in range(300):
        theta = np.exp(logs.astype(np.float64))
        theta /= theta.sum()
        gradient = np.zeros(4)
        for arm in random.choice(4, size=4, p=theta):
            gradient[arm] += (table[arm] - 0.8 + 0.02 * random.standard_normal()) / theta[arm] / 4
        logs = stepped(algorithm, logs, gradient.astype(np.float32))
    theta = np.exp(logs)
    assert theta[2] / theta.sum() > 0.9


@pytest.mark.parametrize("wire", ["fp32", "bf16"])
def test_the_sum_of_squares_goes_on_from_round_to_round_and_log_weights_are_float32_at_the_server(
    wire: str, tmp_path: Path
) -> None:
    plan = make_plan({"wire": {"element_type": wire}}, learning_rates="1,2,4")
    blobs, element_type = Blobs(tmp_path / "blobs"), WIRE_TYPES[plan.wire.element_type]
    name = "m.lora_A.weight"

    def upload(arrays: dict[str, Array], number: int) -> StoredVersion:
        path = tmp_path / f"upload-{number}"
        return StoredVersion(encode(arrays, element_type, path), path)

    version: Version | None = None
    for number, worth in enumerate([None, [0.5, 0.0, -0.25], [0.0, 2.0, 0.0]]):
        algorithm = algorithm_class("fedex")(plan)  # as the server does for each round
        recall(algorithm, version, blobs)
        logs = algorithm.extra({})[LOG_WEIGHTS] if worth is None else np.array(worth, np.float32)
        sent = upload({name: np.ones((2, 2), np.float32), LOG_WEIGHTS: logs}, number)
        maker = Maker(algorithm, blobs, blobs, lambda: False)
        source = Source(sent.payload, element_type)
        made = maker.make(number, version, list, sent.manifest, [source], [1.0])
        version = Version(number, made.parts, made.state)
    assert version is not None
    tensors = {part.name: np.fromfile(blobs.get(bytes.fromhex(part.master)).payload, "<f4") for part in version.parts}
    assert tensors["adapter"].tolist() == [3.0] * 4
    root = math.sqrt(2 * math.log(3))
    expected = np.array([-root / 0.5 * 0.5, -root / math.sqrt(0.25 + 4) * 2, root / 0.5 * 0.25])
    np.testing.assert_allclose(tensors[ARMS], expected - expected.max(), rtol=1e-6)
    assert dict(version.state).keys() == {"memory"}
    recall(algorithm, version, blobs)
    assert algorithm.memory == [4.25]


# A site.


def driven(rule: LocalRule, base: Tensors, extra: Tensors, left: Tensors, steps: int = 10) -> tuple[Turn, Tensors]:
    """Give a rule's one turn what it has left; return the turn, and what is sent."""
    rule.receive(base, extra)
    turns = rule.turns(base, steps)
    turn = next(turns)
    with pytest.raises(StopIteration) as end:
        turns.send(left)
    assert end.value.value is left
    return turn, rule.produce({name: left[name] - base[name] for name in base})


def site_rule(plan: Plan, round_: int, site: int, losses: dict[float, float]) -> DrawnArm:
    """Return a rule whose loss is looked up by what stands in the adapter."""
    rule = local_rule(plan)
    assert isinstance(rule, DrawnArm)
    rule.round, rule.site, rule.learning_rate = round_, site, 0.01
    rule.validate = lambda adapter: losses[float(adapter["x"])]
    return rule


BASE, LEFT = {"x": torch.tensor([1.0])}, {"x": torch.tensor([3.0])}
LOGS = torch.tensor([0.0, -1.0, 1.0, -1.5])
THETA = LOGS.double().softmax(0).tolist()


def test_a_site_trains_with_its_arm_and_sends_what_that_was_worth() -> None:
    plan = make_plan(**FOUR)
    hyper = [(0.5, 1.0), (0.5, 0.3), (2.0, 1.0), (2.0, 0.3)]
    seen = set()
    for site in range(40):
        rule = site_rule(plan, 1, site, {1.0: 0.75, 3.0: 0.5})
        turn, sent = driven(rule, BASE, {LOG_WEIGHTS: LOGS}, LEFT)
        rate, share = hyper[rule.arm]
        assert (turn.steps, turn.learning_rate, turn.start) == (10 * share, pytest.approx(0.01 * rate), BASE)
        assert sent["x"].tolist() == [2.0]
        expected = [0.0] * 4
        expected[rule.arm] = -0.25 / THETA[rule.arm]
        assert sent[LOG_WEIGHTS].tolist() == pytest.approx(expected)
        assert not rule.private
        seen.add(rule.arm)
    assert seen == {0, 1, 2, 3}


def test_a_turn_has_a_step_at_least() -> None:
    rule = site_rule(make_plan(learning_rates="1", steps="0.01,0.02"), 1, 1, {1.0: 1, 3.0: 1})
    turn, _ = driven(rule, BASE, {LOG_WEIGHTS: torch.zeros(2)}, LEFT)
    assert turn.steps == 1


def test_arms_are_drawn_with_theta_by_round_and_site_and_are_the_same_when_drawn_again() -> None:
    plan = make_plan(**FOUR)

    def arm(plan: Plan, round_: int, site: int) -> int:
        rule = site_rule(plan, round_, site, {})
        rule.receive(BASE, {LOG_WEIGHTS: LOGS})
        return rule.arm

    count = 2000
    for drawn in (
        [arm(plan, 1, site) for site in range(count)],
        [arm(plan, round_, 7) for round_ in range(count)],
        [arm(plan.model_copy(update={"seed": seed}), 1, 7) for seed in range(count)],
    ):
        counts = Counter(drawn)
        for index, share in enumerate(THETA):
            # Five standard deviations of a binomial's.
            assert counts[index] / count == pytest.approx(share, abs=5 * math.sqrt(share * (1 - share) / count))
    assert [arm(plan, 3, site) for site in range(20)] == [arm(plan, 3, site) for site in range(20)]


def test_a_discounted_baseline_is_the_mean_of_the_losses_after_earlier_rounds() -> None:
    plan = make_plan(discount=0.5, **FOUR)
    kept: Tensors = {}
    baselines = []
    for number, after in enumerate([0.5, 0.25, 0.125], start=1):
        rule = site_rule(plan, number, 1, {1.0: 0.75, 3.0: after})
        rule.private.update(kept)
        _, sent = driven(rule, BASE, {LOG_WEIGHTS: LOGS}, LEFT)
        kept = rule.private
        baselines.append(after - float(sent[LOG_WEIGHTS][rule.arm]) * THETA[rule.arm])
    assert baselines == pytest.approx([0.75, 0.5, (0.25 + 0.5 * 0.5) / 1.5])


@pytest.mark.parametrize("decided", [True, False])
def test_below_the_cutoff_sites_take_the_likeliest_arm_and_the_log_weights_stay(decided: bool) -> None:
    entropy = -sum(share * math.log(share) for share in THETA)
    plan = make_plan(cutoff=entropy * (1.001 if decided else 0.999), **FOUR)
    arms = set()
    for site in range(40):
        # Nothing is measured: a loss would not be found.
        rule = site_rule(plan, 1, site, {} if decided else {1.0: 0.75, 3.0: 0.5})
        turn, sent = driven(rule, BASE, {LOG_WEIGHTS: LOGS}, LEFT)
        arms.add(rule.arm)
        if decided:
            assert (turn.steps, turn.learning_rate) == (10, pytest.approx(0.02))
            assert sent[LOG_WEIGHTS].tolist() == [0.0] * 4
    assert arms == ({2} if decided else {0, 1, 2, 3})


def test_a_rule_that_measures_where_nobody_can_says_so() -> None:
    rule = local_rule(make_plan())
    with pytest.raises(TrainingFailed, match="measured an adapter"):
        rule.validate({})


# The plan.


@pytest.mark.parametrize("text", ["", "1,", "1;2", "0,1", "-1,2", "nan,1", "inf,1", "1,1.0", "a"])
def test_factors_are_refused_by_name(text: str) -> None:
    with pytest.raises(PlanInvalid, match=r"algorithm\.parameters\.steps: .*(between commas|twice)"):
        make_plan(steps=text)
    with pytest.raises(ValueError, match=r"between commas|twice"):
        factors(text)


def test_factors_are_read() -> None:
    assert factors(" 0.3, 1 ,3e0") == [0.3, 1.0, 3.0]
    assert made(**FOUR).parameters.arms == [(0.5, 1.0), (0.5, 0.3), (2.0, 1.0), (2.0, 0.3)]


def test_the_recorded_plan_has_every_parameter() -> None:
    recorded = {"learning_rates": "0.3,1,3", "steps": "1", "discount": None, "cutoff": 0.0}
    assert make_plan().algorithm.parameters == recorded


# For real.


@pytest.fixture
def site(tmp_path: Path, alone: Group, tiny_model: Path, tiny_rows: Path) -> Callable[[Plan], Session]:
    def prepared(plan: Plan) -> Session:
        session = Session(lambda: alone, lambda _: None, bool)
        session.carry_out(Prepare(run_id="r", plan=plan, model=tiny_model, data=tiny_rows, role="site"))
        return session

    return prepared


def tiny_plan(stage: int = 2, **algorithm: Any) -> Plan:  # noqa: ANN401
    return Plan.model_validate(
        {
            "name": "t",
            "seed": 11,
            "model": {"name": "tiny"},
            "adapter": {"rank": 3},
            "algorithm": algorithm,
            "train": {"steps": 4, "batch_size": 6, "precision": "fp32", "learning_rate": 0.01},
            "deepspeed": {"zero_stage": stage},
            "data": {"template": "plain", "max_length": 24, "validation_fraction": 0.2},
            "evaluate": {"metrics": ["loss"]},
        }
    )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("stage", [2, 3])
def test_a_round_is_fedavgs_with_the_arms_rate_and_steps_and_its_losses_are_those_that_are_reported(
    stage: int, site: Callable[[Plan], Session], tmp_path: Path
) -> None:
    plan = tiny_plan(stage, name="fedex", parameters={"learning_rates": "0.5,4", "steps": "0.5,1"})
    session = site(plan)
    first, base, delta, after = (tmp_path / f"{name}.safetensors" for name in ("first", "base", "delta", "after"))
    session.carry_out(Build(adapter=first))
    start = read_tensors(first)
    logs = torch.tensor([0.0, -0.5, 0.5, 0.2])
    write_tensors(base, {**start, LOG_WEIGHTS: logs})
    finished = session.carry_out(Train(round=1, base=base, delta=delta))
    sent = read_tensors(delta)
    gradient = sent.pop(LOG_WEIGHTS)
    (arm,) = gradient.nonzero().flatten().tolist()
    rate, share = [(0.5, 0.5), (0.5, 1.0), (4.0, 0.5), (4.0, 1.0)][arm]
    assert finished.counts["steps"] == 4 * share
    assert finished.metrics["learning_rate"] == pytest.approx(0.01 * rate)

    write_tensors(after, {name: start[name] + sent[name] for name in start} | {LOG_WEIGHTS: logs})
    losses = [session.carry_out(Evaluate(adapter=path)).metrics["loss"] for path in (base, after)]
    assert losses[1] != pytest.approx(losses[0], abs=1e-4)
    assert float(gradient[arm]) == pytest.approx((losses[1] - losses[0]) / float(logs.softmax(0)[arm]), rel=1e-3)

    train = plan.train.model_copy(update={"learning_rate": 0.01 * rate, "steps": int(4 * share)})
    plain = tiny_plan(stage).model_copy(update={"train": train})
    alike = site(plain)
    alike.carry_out(Train(round=1, base=first, delta=delta))
    for name, tensor in read_tensors(delta).items():
        torch.testing.assert_close(sent[name], tensor, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_site_without_validation_rows_is_told(
    tmp_path: Path, alone: Group, tiny_model: Path, tiny_rows: Path
) -> None:
    few = tmp_path / "few.jsonl"
    few.write_text("".join(tiny_rows.read_text().splitlines(keepends=True)[:1]))
    order = {"run_id": "r", "model": tiny_model, "data": few, "role": "site"}
    session = Session(lambda: alone, lambda _: None, bool)
    with pytest.raises(DataInvalid, match="fell to validation, and fedex measures"):
        session.carry_out(Prepare(plan=tiny_plan(name="fedex"), **order))
    session.carry_out(Prepare(plan=tiny_plan(), **order))
