"""Sites that rebuild the model: those of a round have to agree, and one that differs stops nobody else."""

from pathlib import Path

import pytest
from core_steps import go, ready, reduced, update
from engine_harness import Member, make_plan, serving

from fsllm_common.errors import FsllmError
from fsllm_server.engine import events
from fsllm_server.engine.core import decide
from fsllm_server.engine.effects import Notify
from fsllm_server.engine.events import Event
from fsllm_server.engine.state import Kind, Run, Status
from fsllm_server.engine.uploads import Expected

ONE, OTHER = b"\1" * 32, b"\2" * 32


async def test_an_update_of_another_model_than_most_have_rebuilt_is_refused(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        a, b, c = (Member(server, name).attach(silent="train") for name in "abc")
        run = await server.engine.submit(make_plan(rounds=2, cohort={"quorum": 3}), "r1")
        first, second, third = [await site.order("train") for site in (a, b, c)]
        await a.upload(first, 1.0, model_digest=ONE)
        await b.upload(second, 1.0, model_digest=ONE)
        for wrong in (OTHER, b""):
            with pytest.raises(FsllmError, match=r"c has rebuilt .* round 1, a, b 0101") as refused:
                await c.upload(third, 2.0, model_digest=wrong)
            assert refused.value.reason == "MODEL_DIGEST_MISMATCH"
        with pytest.raises(FsllmError) as refused:
            await c.upload(third, 2.0, model_digest=b"\1" * 31)
        assert refused.value.reason == "MANIFEST_INVALID"
        await c.upload(third, 2.0, model_digest=ONE)
        # The next version is another one.
        for site in (a, b, c):
            await site.upload(await site.order("train", 2), 1.0, model_digest=OTHER)
        await server.done(run)
        commits = server.engine._runners[run].run.commits
        digests = [{c.update.model_digest for c in commit.contributions} for commit in commits]
        assert digests == [{""}, {ONE.hex()}, {OTHER.hex()}]


async def test_it_is_refused_too_when_the_others_come_while_it_is_on_its_way(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        a, b, c = (Member(server, name).attach(silent="train") for name in "abc")
        await server.engine.submit(make_plan(cohort={"quorum": 3}), "r1")
        order = await c.order("train")
        manifest, payload = c.payload(order, 2.0)
        expected = server.engine.expect_upload("c", c.begin(order, manifest, model_digest=OTHER))
        assert isinstance(expected, Expected)
        for site in (a, b):
            await site.upload(await site.order("train"), 1.0, model_digest=ONE)
        spool = server.spools.open(expected.run_id, expected.round, "c", expected.manifest)
        spool.write(0, memoryview(payload))
        with pytest.raises(FsllmError) as refused:
            await server.engine.record_upload(expected, await spool.verify(expected.manifest, max_norm=None))
        spool.close()
        assert refused.value.reason == "MODEL_DIGEST_MISMATCH"


def delivered(run: Run, **digests: str) -> Run:
    """Return the run with updates of these sites, in this order, each from the model of this digest."""
    orders = {order.member: order for order in run.open_orders(Kind.TRAIN)}
    return go(run, *(from_model(update(orders[name]), digest) for name, digest in digests.items()))


def from_model(event: Event, digest: str) -> Event:
    return event.model_copy(update={"model_digest": digest})


def test_the_first_one_to_deliver_stops_nobody() -> None:
    run = delivered(ready(make_plan(cohort={"quorum": 3}), *"mabcd"), m="ff", a="01", b="01", c="01")
    (last,) = run.open_orders(Kind.TRAIN)
    run, effects = decide(run, from_model(update(last), "01"))
    told = [effect.message for effect in effects if isinstance(effect, Notify) and effect.kind == "rejected"]
    assert told == ["an update of m is left out: m has rebuilt the model ff in round 1, a, b, c, d 01"]
    assert (run.phase, sorted(run.updates)) == ("reduce", ["a", "b", "c", "d"])
    run = go(run, reduced(run))
    assert sorted(one.update.member for one in run.commits[1].contributions) == ["a", "b", "c", "d"]
    assert "m" in [order.member for order in run.open_orders(Kind.TRAIN)], "it may be in order by the next round"


def test_without_it_there_may_be_too_few() -> None:
    run = ready(make_plan(cohort={"quorum": 3}, timing={"failed_rounds": 2}), *"mab")
    run = delivered(run, m="ff", a="01", b="01")
    (again,) = run.open_orders(Kind.TRAIN)
    assert (again.member, run.failures, sorted(run.updates)) == ("m", 1, ["a", "b"])
    assert "m: train: m has rebuilt the model ff in round 1, a, b 01" in run.failure
    assert go(run, from_model(update(again), "01")).phase == "reduce"


def test_with_as_many_on_either_side_people_have_to_look() -> None:
    run = ready(make_plan(), *"abcd")
    run = delivered(run, a="01", b="02", c="02", d="01")
    assert (run.status, run.reason) == (Status.PAUSED, "MODEL_DIGEST_MISMATCH")
    assert run.message == "the sites of round 1 have rebuilt different models: a, d: 01; b, c: 02"
    run = go(run, events.Resumed(at=9))
    assert [order.member for order in run.open_orders(Kind.TRAIN)] == ["a", "b", "c", "d"]
    assert delivered(run, a="01", b="01", c="01", d="01").phase == "reduce"
