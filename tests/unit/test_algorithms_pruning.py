"""HetLoRA's rank self-pruning: the penalty's gradient by hand, what is cut and stays cut, and rounds for real."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fsllm_client.trainer.group import Group
from fsllm_client.trainer.kept import PRIVATE, Kept
from fsllm_client.trainer.orders import Build, Prepare, Train
from fsllm_client.trainer.session import Session
from fsllm_client.trainer.tensor_files import read_tensors, write_tensors
from fsllm_common.algorithms import LocalRule, local_rule
from fsllm_common.algorithms.hetlora import SelfPruning
from fsllm_common.plan import Plan, plan_from_json

Tensors = dict[str, torch.Tensor]

A, B = "m.lora_A.weight", "m.lora_B.weight"


def make_plan(train: dict[str, Any] | None = None, **parameters: Any) -> Plan:  # noqa: ANN401
    raw = {
        "name": "p",
        "model": {"name": "tiny"},
        "adapter": {"rank": 4, "targets": ["q_proj", "down_proj"]},
        "algorithm": {"name": "hetlora", "parameters": parameters},
        "train": train or {},
        "data": {"template": "plain", "max_length": 24, "validation_fraction": 0.2, "packing": False},
    }
    return plan_from_json(json.dumps(raw).encode())


def factors(seed: int, rank: int = 4) -> Tensors:
    random = torch.Generator().manual_seed(seed)
    return {A: torch.randn((rank, 5), generator=random), B: torch.randn((6, rank), generator=random)}


class Step:
    """A step that a rule takes by the ordinary way."""

    def __init__(self, at: Tensors) -> None:
        self.at = at
        self.taken = 0

    def values(self) -> Tensors:
        return self.at

    def step(self) -> None:
        self.taken += 1


def penalty(at: Tensors, first: int) -> torch.Tensor:
    return at[B][:, first:].norm() * at[A][first:].norm()


def pruning(plan: Plan, base: Tensors, **kept: float) -> SelfPruning:
    rule = local_rule(plan)
    assert isinstance(rule, SelfPruning)
    rule.private.update({f"rank/{module}": torch.tensor([rank]) for module, rank in kept.items()})
    rule.receive(base, {})
    return rule


@pytest.mark.parametrize(("keep", "first"), [(0.99, 3), (0.5, 2)])
def test_the_gradient_gains_the_penaltys(keep: float, first: int) -> None:
    at, plain = factors(1), factors(2)
    rule = pruning(make_plan(prune_penalty=0.3, keep=keep), factors(3))
    step = Step(at)
    rule.take_step(step)  # type: ignore[arg-type]
    assert step.taken == 1
    leaves = {name: value.clone().requires_grad_() for name, value in at.items()}
    (0.3 * penalty(leaves, first)).backward()
    for name in (A, B):
        given = plain[name].clone()
        found = rule.after_backward(name, given, at[name])
        torch.testing.assert_close(found, plain[name] + leaves[name].grad)
        assert given.equal(plain[name])
        leading = found[:first] if name == A else found[:, :first]
        assert leading.equal(plain[name][:first] if name == A else plain[name][:, :first])
    # By hand: lambda |B'| A' / |A'|.
    other = at[B][:, first:].norm()
    expected = plain[A][first:] + 0.3 * other * at[A][first:] / at[A][first:].norm()
    torch.testing.assert_close(rule.after_backward(A, plain[A], at[A])[first:], expected)


def test_what_is_0_has_no_slope_and_other_tensors_have_no_penalty() -> None:
    at = factors(1)
    at[B] = at[B] * 0
    rule = pruning(make_plan(prune_penalty=0.3), at)
    rule.take_step(Step(at))  # type: ignore[arg-type]
    plain = factors(2)
    assert rule.after_backward(B, plain[B], at[B]).equal(plain[B])
    assert rule.after_backward(A, plain[A], at[A]).equal(plain[A])  # for |B'| is 0
    other = torch.ones(3)
    assert rule.after_backward("head.bias", other, other) is other


def turned(rule: SelfPruning, base: Tensors, left: Tensors) -> tuple[Tensors, Tensors]:
    """Return what the turn starts from, and what the rule makes of what it leaves."""
    turns = rule.turns(base, 7)
    turn = next(turns)
    assert turn.steps == 7
    with pytest.raises(StopIteration) as end:
        turns.send(left)
    return dict(turn.start), end.value.value


def shrunk(at: Tensors, a: float, b: float) -> Tensors:
    return {A: torch.cat([at[A][:3], at[A][3:] * a]), B: torch.cat([at[B][:, :3], at[B][:, 3:] * b], dim=1)}


@pytest.mark.parametrize(("a", "b", "pruned"), [(0.5, 1.9, True), (0.5, 2.1, False), (1.0, 1.0, False), (0.0, 9, True)])
def test_the_last_ranks_are_cut_where_the_product_of_their_norms_has_fallen(a: float, b: float, pruned: bool) -> None:
    base = factors(1)
    rule = pruning(make_plan(prune_penalty=0.3), base)
    left = shrunk(base, a, b)
    start, local = turned(rule, base, left)
    assert all(start[name].equal(base[name]) for name in base)
    assert {name: float(value) for name, value in rule.private.items()} == {"rank/m": 3.0 if pruned else 4.0}
    assert local[A][:3].equal(left[A][:3])
    assert local[B][:, :3].equal(left[B][:, :3])
    assert local[A].shape == (4, 5)
    assert local[A][3].equal(left[A][3] * (not pruned))
    assert local[B][:, 3].equal(left[B][:, 3] * (not pruned))


def test_what_was_pruned_stays_so_though_others_fill_it_again() -> None:
    base = factors(1)
    rule = pruning(make_plan(prune_penalty=0.3), base, m=3.0)
    start, local = turned(rule, base, base)
    for adapter in (start, local):
        assert adapter[A].equal(torch.cat([base[A][:3], torch.zeros(1, 5)]))
        assert adapter[B].equal(torch.cat([base[B][:, :3], torch.zeros(6, 1)], dim=1))
    assert float(rule.private["rank/m"]) == 3.0
    # The last rank of those that are left is what costs something now.
    rule.take_step(Step(start))  # type: ignore[arg-type]
    gained = rule.after_backward(A, torch.zeros(4, 5), start[A])
    assert gained.abs().sum(dim=1).nonzero().flatten().tolist() == [2]


def test_one_rank_is_always_left() -> None:
    base = factors(1, rank=1)
    rule = pruning(make_plan(prune_penalty=0.3), base)
    _, local = turned(rule, base, {name: value * 0.1 for name, value in base.items()})
    assert float(rule.private["rank/m"]) == 1.0
    assert local[A].equal(base[A] * 0.1)


def test_without_a_price_training_is_plain() -> None:
    assert type(local_rule(make_plan())) is LocalRule
    assert make_plan({"optimizer_state": "keep"}).train.optimizer_state == "keep"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("stage", [2, 3])
def test_rounds_for_real(stage: int, alone: Group, tmp_path: Path, tiny_model: Path, tiny_rows: Path) -> None:
    """A price that outweighs the loss: last ranks are given up in the first round, and stay so in the second."""
    train = {"steps": 3, "batch_size": 6, "precision": "fp32", "optimizer": "sgd", "learning_rate": 0.1}
    price, plain = (
        make_plan({**train, "max_grad_norm": 0}, prune_penalty=penalty).model_copy(
            update={"deepspeed": make_plan().deepspeed.model_copy(update={"zero_stage": stage})}
        )
        for penalty in (0.5, 0.0)
    )
    base = tmp_path / "base.safetensors"
    deltas = {}
    for name, plan in (("plain", plain), ("price", price)):
        session = Session(lambda: alone, lambda _: None, bool)
        session.carry_out(Prepare(run_id="r", plan=plan, model=tiny_model, data=tiny_rows, role="site"))
        if not base.exists():
            session.carry_out(Build(adapter=base))
            random = torch.Generator().manual_seed(1)
            some = {n: 0.3 * torch.randn(t.shape, generator=random) for n, t in read_tensors(base).items()}
            write_tensors(base, some)
        for number in (1, 2):
            file = tmp_path / f"{name}-{number}.safetensors"
            session.carry_out(Train(round=number, base=base, delta=file, resume=tmp_path / name))
            deltas[name, number] = read_tensors(file)
    start = read_tensors(base)
    assert not (tmp_path / "plain").exists()
    assert min(float((start[n] + deltas["plain", 2][n]).abs().min(dim=0).values.max()) for n in start) > 0
    for number, rank in ((1, 3), (2, 2)):
        kept = Kept(tmp_path / "price", PRIVATE).before(number + 1)
        assert kept is not None
        assert len(kept) == len(start) // 2
        assert {float(left) for left in kept.values()} == {float(rank)}
        for name, delta in deltas["price", number].items():
            local = start[name] + delta
            ranks = local.norm(dim=1) if "lora_A" in name else local.norm(dim=0)
            assert (ranks > 0).tolist() == [True] * rank + [False] * (4 - rank)
