"""What a round trains, sends and leaves alone, and how its turns follow on each other."""

from collections.abc import Generator

import pytest
import torch

from fsllm_client.trainer.loop import _driven
from fsllm_client.trainer.sharing import Sharing
from fsllm_common.algorithms import Turn
from fsllm_common.plan import Plan

Tensors = dict[str, torch.Tensor]
A, B = "m.q_proj.lora_A.weight", "m.q_proj.lora_B.weight"


def sharing(name: str, rounds: int = 4) -> Sharing:
    plan = {"name": "t", "rounds": rounds, "model": {"name": "m"}, "algorithm": {"name": name}}
    return Sharing(Plan.model_validate(plan), (A, B))


@pytest.mark.parametrize(
    ("name", "sent", "personal", "fixed"),
    [
        ("fedavg", ({A, B}, {A, B}), set(), set()),
        ("ffa-lora", ({B}, {B}), set(), {A}),
        ("rolora", ({B}, {A}), set(), set()),
        ("fedsa-lora", ({A}, {A}), {B}, set()),
        ("fedper", ({A}, {A}), {B}, set()),
    ],
)
def test_a_round_trains_what_is_sent_and_what_is_personal(
    name: str, sent: tuple[set[str], set[str]], personal: set[str], fixed: set[str]
) -> None:
    found = sharing(name)
    for number, expected in enumerate(sent, start=1):
        assert found.sent(number) == expected
        assert found.trained(number) == expected | personal
    assert found.personal == personal
    assert found.fixed == fixed
    assert found.alternates == (sent[0] != sent[1])
    assert sharing("rolora", rounds=1).fixed == {A}  # its round never comes


def test_each_turn_is_sent_what_it_has_left_and_a_round_may_have_none() -> None:
    one = torch.ones(1)

    def turns() -> Generator[Turn, Tensors, Tensors]:
        first = yield Turn({"x": one}, 1)
        second = yield Turn({"x": first["x"] * 10}, 1)
        return {"first": first["x"], "second": second["x"]}

    def none() -> Generator[Turn, Tensors, Tensors]:
        return {"x": one}
        yield

    assert _driven(turns(), lambda turn: {"x": turn.start["x"] + 1}) == {"first": one * 2, "second": one * 21}
    assert _driven(none(), lambda turn: {}) == {"x": one}
