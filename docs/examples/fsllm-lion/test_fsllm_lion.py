"""Both halves of FedLion by themselves: no server, no site, no model."""

from typing import Any

import numpy as np
import torch
from fsllm_lion import FedLion

from fsllm_common.algorithms import Block
from fsllm_common.plan import Plan


def method(rate: float = 0.5, **parameters: float) -> FedLion:
    """Return the server's half for a plan with these parameters."""
    algorithm: dict[str, Any] = {"name": "fedlion", "server_learning_rate": rate, "parameters": parameters}
    return FedLion(Plan.model_validate({"name": "p", "model": {"name": "m"}, "algorithm": algorithm}))


def test_the_server_takes_lions_steps() -> None:
    """From x = 0: the sign of the first delta, then that of half the momentum and half the second."""
    lion = method(rate=0.5, beta1=0.5, beta2=0.75)
    state = {name: np.full(3, value, np.float32) for name, value in lion.state().items()}

    first = lion.apply(Block(1, np.zeros(3, np.float32), np.array([1, -1, 0], np.float32), state))
    np.testing.assert_array_equal(first, np.array([0.5, -0.5, 0], np.float32), strict=True)
    np.testing.assert_array_equal(state["momentum"], [0.25, -0.25, 0])

    second = lion.apply(Block(2, first, np.array([-1, 1, 2], np.float32), state))
    np.testing.assert_array_equal(second, np.array([0, 0, 0.5], np.float32), strict=True)


def test_a_block_does_not_know_where_it_lies() -> None:
    """The server may cut a tensor anywhere, so all at once must be the same as piece by piece."""
    lion = method()
    base, mean, momentum = np.random.default_rng(0).standard_normal((3, 1000)).astype(np.float32)
    whole = lion.apply(Block(1, base, mean, {"momentum": momentum.copy()}))
    pieces = [
        lion.apply(Block(1, base[at], mean[at], {"momentum": momentum[at].copy()}))
        for at in (slice(0, 7), slice(7, 512), slice(512, 1000))
    ]
    np.testing.assert_array_equal(np.concatenate(pieces), whole)


def test_the_pull_fades() -> None:
    """In round 3 it is mu fade^2 of the distance gone."""
    lion = method(mu=0.4, fade=0.5)
    rule = lion.local_rule(lion.plan, lion.parameters)
    rule.round = 3
    rule.receive({"w": torch.tensor([1.0, 2.0])}, {})
    got = rule.after_backward("w", gradient=torch.tensor([10.0, 10.0]), value=torch.tensor([2.0, 0.0]))
    torch.testing.assert_close(got, torch.tensor([10.1, 9.8]))
