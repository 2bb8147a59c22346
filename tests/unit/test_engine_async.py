"""Asynchronous rounds (FedBuff, FedAsync): nobody waits for a slow site, and its update counts for less, once."""

import asyncio
from pathlib import Path

import numpy as np
import pytest
from engine_harness import Member, Server, make_plan

from fsllm.v1 import federation_pb2
from fsllm_common.plan.schema import Buffer
from fsllm_common.tensors.arrays import decode
from fsllm_server.engine.staleness import weight


def test_the_weight_of_staleness() -> None:
    polynomial = Buffer(size=2)
    assert [weight(polynomial, t) for t in (0, 3)] == [1.0, 0.5]
    hinge = Buffer(size=2, weight="hinge", slope=10, threshold=4)
    assert [weight(hinge, t) for t in (0, 4, 5)] == [1.0, 1.0, 1 / 11]
    assert weight(Buffer(size=2, weight="constant"), 9) == 1.0


class Slow(Member):
    """Trains its first order until it is let go."""

    def __init__(self, server: Server, name: str, value: float) -> None:
        super().__init__(server, name, value=value)
        self.go = asyncio.Event()
        self.late: asyncio.Task[None] | None = None

    async def do_train(self, order: federation_pb2.Order) -> None:
        if self.late is None:
            self.late = asyncio.create_task(self._later(order))
        else:
            await super().do_train(order)

    async def _later(self, order: federation_pb2.Order) -> None:
        await self.go.wait()
        await super().do_train(order)


def value_of(server: Server, run: str) -> float:
    stored = server.engine.version(run, None)
    (found,) = {float(v) for array in decode(stored.manifest, stored.payload).values() for v in np.unique(array)}
    return found


async def test_a_slow_site_holds_nobody_up_and_counts_once_and_for_less(tmp_path: Path) -> None:
    plan = make_plan(rounds=4, algorithm={"weighting": "uniform"}, cohort={"quorum": 2, "buffer": {"size": 2}})
    async with Server(tmp_path) as server:
        fast = [Member(server, name, value=1.0).attach() for name in ("a", "b")]
        slow = Slow(server, "c", 8.0)
        slow.attach()
        run = await server.engine.submit(plan, "1")
        await server.until(run, lambda n: (n.kind, n.subject) == ("commit", "2"))
        # c still trains from version 0; the next version has its update and one other's.
        for member in fast:
            member.act["train"] = member.nothing
        await server.until(run, lambda n: (n.kind, n.subject) == ("phase", "collect") and n.round >= 3)
        slow.go.set()
        fast[0].act.clear()
        done = server.engine.get_run(run)
        order = fast[0].of("train")[-1]
        if order.round >= 3 and "a" not in {c.member for commit in done.commits[3:] for c in commit.contributions}:
            await fast[0].do_train(order)
        await server.until(run, lambda n: (n.kind, n.subject) == ("commit", "3"))
        third = server.engine.get_run(run).commits[3]
        shares = {c.member: c.weight for c in third.contributions}
        assert shares["c"] == pytest.approx(0.5 / 3**0.5)
        assert sorted(shares)[-1] == "c"
        assert value_of(server, run) == pytest.approx(1 + 1 + 0.5 + 8 * 0.5 / 3**0.5, rel=1e-6)
        counted = [c.member for commit in server.engine.get_run(run).commits[1:] for c in commit.contributions]
        assert counted.count("c") == 1


async def test_what_is_too_stale_is_withdrawn(tmp_path: Path) -> None:
    buffer = {"size": 2, "max_staleness": 1}
    plan = make_plan(rounds=4, algorithm={"weighting": "uniform"}, cohort={"quorum": 2, "buffer": buffer})
    async with Server(tmp_path) as server:
        for name in ("a", "b"):
            Member(server, name).attach()
        slow = Slow(server, "c", 8.0)
        slow.attach()
        run = await server.engine.submit(plan, "1")
        done = await server.done(run)
        assert len(done.commits) == 5
        first = slow.of("train")[0]
        assert first.order_id in {withdrawn.order_id for withdrawn in slow.withdrawn}
        # It was asked anew, and that is what counts: from a version that is not too old.
        counted = [commit.round for commit in done.commits[1:] for c in commit.contributions if c.member == "c"]
        assert slow.of("train")[1].round >= 2
        assert all(round_ >= slow.of("train")[1].round for round_ in counted)


def stepped(name: str, deltas: list[float]) -> float:
    """Return where the server's steps lead from 0 by their papers' formulas, at rate 0.1 and the default betas."""
    x = m = 0.0
    v = 1e-6
    for delta in deltas:
        m = {"fedavgm": 0.9 * m + delta, "fedadam": 0.9 * m + 0.1 * delta, "fedyogi": 0.9 * m + 0.1 * delta}.get(
            name, delta
        )
        if name == "fedadam":
            v = 0.99 * v + 0.01 * delta**2
        elif name == "fedyogi":
            v -= 0.01 * delta**2 * np.sign(v - delta**2)
        elif name == "fedadagrad":
            v += delta**2
        x += 0.1 * (m / (v**0.5 + 1e-3) if name in ("fedadam", "fedyogi", "fedadagrad") else m)
    return x


@pytest.mark.parametrize("name", ["fedavg", "fedavgm", "fedadam", "fedyogi", "fedadagrad", "fedprox"])
async def test_versions_of_single_updates_are_the_servers_steps_and_recomputed(tmp_path: Path, name: str) -> None:
    algorithm = {"name": name, "weighting": "uniform", "server_learning_rate": 0.1}
    plan = make_plan(rounds=3, algorithm=algorithm, cohort={"quorum": 1, "buffer": {"size": 1, "weight": "constant"}})
    async with Server(tmp_path) as server:
        members = [Member(server, name).attach() for name in ("a", "b")]
        run = await server.engine.submit(plan, "1")
        done = await server.done(run)
        assert [len(commit.contributions) for commit in done.commits] == [1, 1, 1, 1]
        findings = [f.finding async for f in server.engine.verify(run, None) if f.finding.manifest.round]
        assert {(f.manifest.round, tuple(f.problems), f.note) for f in findings} == {(r, (), "") for r in (1, 2, 3)}
        values = {member.name: member.value for member in members}
        sent = [values[commit.contributions[0].member] for commit in done.commits[1:]]
        assert value_of(server, run) == pytest.approx(stepped(name, sent), rel=1e-5)
