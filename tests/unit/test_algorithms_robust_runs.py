"""Robust rules in whole rounds: what is committed, verified, and refused. Members send constants."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_harness import Member, Server, make_plan, serving
from test_verify import BROKEN, EVERYTHING, RECOMPUTED, blob, change, findings, flip, next_float

from fsllm.v1.federation_pb2 import Order
from fsllm_common.errors import FsllmError
from fsllm_common.round_manifest import decode
from fsllm_server.engine.reducing import installed_algorithm, weigh
from fsllm_server.engine.state import Update, Version

VALUES = (0.1, 0.11, 0.12, 0.13, 0.14, 0.15, -3e38)
"""Of seven sites; the last is up to no good. Its square would drown the others' even in a sum of float64."""


async def one_round(server: Server, name: str, values: tuple[float, ...] = VALUES, **parameters: Any) -> str:  # noqa: ANN401
    for site, value in zip("abcdefg", values, strict=False):
        Member(server, site, value=value, examples=10**9 if value < 0 else 1).attach()
    algorithm = {"name": name, "parameters": parameters}
    # Not checked, as a plan that was recorded: the rules refuse a quorum as small as the last test's.
    plan = make_plan(algorithm=algorithm, rounds=1, cohort={"quorum": len(values)}, evaluate={"every": 0})
    return await server.engine.submit(plan, "r1")


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("median", 0.12, 0.12),
        ("trimmed-mean", 0.12, 0.12),
        ("krum", 0.11, 0.14),
        ("multi-krum", 0.11, 0.14),
        ("bulyan", 0.11, 0.14),
        ("geometric-median", 0.1, 0.15),
        ("norm-bound", 0.07, 0.1),
        ("centred-clipping", 0.09, 0.15),
    ],
)
async def test_a_round_with_a_bad_update_is_right_and_recomputed(
    tmp_path: Path, name: str, low: float, high: float
) -> None:
    async with serving(tmp_path, EVERYTHING) as server:
        run = await one_round(server, name)
        await server.done(run)
        found = await findings(server, run)
        assert [(f.verdict, list(f.problems), f.note) for f in found] == [(RECOMPUTED, [], "")] * 2
        result = decode(found[1].manifest.body)["result"]
        (value,) = set(np.frombuffer(blob(tmp_path, result["master"]).read_bytes(), "<f4").tolist())
        assert low - 1e-6 <= value <= high + 1e-6
        weights = [update["weight"] for update in decode(found[1].manifest.body)["updates"]]
        if name in ("krum", "multi-krum", "bulyan"):
            assert weights[-1] == 0.0
        # A share that was changed by one bit is found, whatever it was computed from.
        change(tmp_path, "reduced", 1, next_float)
        await server.restart()
        (wrong,) = [f for f in await findings(server, run) if f.verdict == BROKEN]
        assert any("the algorithm gives" in problem for problem in wrong.problems)


@pytest.mark.parametrize("bound", ["median", "running-median"])
async def test_the_running_median_is_of_all_rounds_so_far_and_outlives_a_restart(tmp_path: Path, bound: str) -> None:
    """Norms are 1, 2, 3 in the first round, and 4, 8, 12 in the second."""
    async with serving(tmp_path, EVERYTHING) as server:
        for site, value in zip("abc", (1, 2, 3), strict=True):
            member = Member(server, site).attach()

            async def train(order: Order, member: Member = member, value: int = value) -> None:
                await member.upload(order, value / 8 if order.round == 1 else value / 2)

            member.act["train"] = train
        algorithm = {"name": "norm-bound", "parameters": {"bound": bound}}
        plan = make_plan(algorithm=algorithm, rounds=2, cohort={"quorum": 3}, evaluate={"every": 0})
        run = await server.engine.submit(plan, "r1")
        await server.done(run)
        found = await findings(server, run)
        assert [(f.verdict, list(f.problems)) for f in found] == [(RECOMPUTED, [])] * 3
        manifests = [decode(one.manifest.body) for one in found]
        of = {"median": 8, "running-median": 3.5}[bound]
        for manifest, middle, norms in zip(manifests[1:], (2, of), ((1, 2, 3), (4, 8, 12)), strict=True):
            weights = [update["weight"] for update in manifest["updates"]]
            assert weights == pytest.approx([min(1, middle / norm) / 3 for norm in norms])
        kept = [manifest["result"].get("state", {}).get("memory") for manifest in manifests]
        if bound == "median":
            assert kept == [None] * 3
            return
        numbers = [np.frombuffer(blob(tmp_path, digest).read_bytes(), "<f4") for digest in kept[1:]]
        assert [array[array > 0].tolist() for array in numbers] == [[1, 2, 3], [1, 2, 3, 4, 8, 12]]
        # What was remembered is part of what is verified.
        flip(blob(tmp_path, kept[1]))
        await server.restart()
        assert {f.manifest.round for f in await findings(server, run) if f.verdict == BROKEN} == {1, 2}


def test_too_few_updates_have_a_reason() -> None:
    plan = make_plan(algorithm={"name": "bulyan"})
    updates = [Update(name, 1, "", 0, 1, 1, 1) for name in "abcdef"]
    with pytest.raises(FsllmError, match="bulyan needs 7") as error:
        weigh(installed_algorithm("bulyan")(plan), Version(0, ()), updates, [], {}, lambda: False)
    assert error.value.reason == "TOO_FEW_UPDATES"


async def test_too_few_updates_pause_the_run_and_say_so(tmp_path: Path) -> None:
    async with serving(tmp_path, EVERYTHING) as server:
        run = await one_round(server, "krum", VALUES[:4])
        await server.until(run, lambda notice: (notice.kind, notice.subject) == ("status", "paused"))
        told = server.engine.get_run(run)
        assert "krum needs 5 updates" in told.message
        assert "the round has 4" in told.message
        assert len(told.commits) == 1


async def test_a_round_that_lacked_the_trusted_update_goes_on_when_it_is_there(tmp_path: Path) -> None:
    plan = make_plan(algorithm={"name": "fltrust"}, rounds=1, evaluate={"every": 0}, timing={"collect_seconds": 0.2})
    async with serving(tmp_path, EVERYTHING) as server:
        judge = Member(server, "judge", role="evaluator", value=0.5).attach()
        judge.act["train"] = judge.nothing
        for site, value in (("a", 2.0), ("b", -1.0)):
            Member(server, site, value=value).attach()
        run = await server.engine.submit(plan, "r1")
        await server.until(run, lambda notice: (notice.kind, notice.subject) == ("status", "paused"))
        assert "the round has none" in server.engine.get_run(run).message
        judge.act.clear()
        await server.engine.resume(run)
        done = await server.done(run)
        # a points where the trusted update points and is cut to its length; b does not.
        weights = {c.member: c.weight for c in done.commits[1].contributions}
        assert weights == {"a": pytest.approx(0.25), "b": 0.0, "judge": 0.0}
        assert [f.verdict for f in await findings(server, run)] == [RECOMPUTED] * 2
