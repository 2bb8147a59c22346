"""How long uploads are kept after the commit, and that their removal may be cut off at any instant."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from engine_harness import Member, Server, make_plan, serving

from fsllm_common import failpoints
from fsllm_common.errors import FsllmError, Unavailable
from fsllm_common.plan import Plan
from fsllm_server.engine.events import Part
from fsllm_server.engine.retention import ALL, Retention
from fsllm_server.engine.state import Commit, Contribution, Run, Status, Update, Version
from fsllm_server.store.files import exclusive, shared
from fsllm_server.store.spools import KEEP

PLAN = Plan.model_validate({"name": "x", "model": {"name": "synthetic"}, "algorithm": {"name": "noop"}})


def commit(round_: int, at: float) -> Commit:
    update = Update("a", round_, "00", 4, 1, 1, 1)
    return Commit(
        round_,
        Version(round_, (Part(name="adapter", digest="00", master="00", payload_bytes=4),)),
        at,
        (Contribution(update, 1.0),),
        (),
        (),
    )


def run(status: Status = Status.RUNNING) -> Run:
    """Five rounds, committed at 0, 10, ... 40 s."""
    return Run("r", PLAN, False, 0.0, status=status, round=5, commits=tuple(commit(i, 10.0 * i) for i in range(5)))


def kept(retention: Retention, now: float) -> list[int]:
    return [round_ for round_ in range(5) if "a" in retention.keeps(run(), round_, now)]


def test_the_last_rounds_are_kept_for_so_long() -> None:
    assert kept(Retention(rounds=2, seconds=1000), now=50) == [3, 4]
    assert kept(Retention(rounds=9, seconds=25), now=50) == [3, 4]
    assert kept(Retention(rounds=0, seconds=1000), now=50) == []
    assert kept(Retention(rounds=9, seconds=0), now=50) == []
    # A clock that was set back keeps them longer, never shorter.
    assert kept(Retention(rounds=9, seconds=25), now=-1000) == [0, 1, 2, 3, 4]


def test_only_what_was_counted_is_kept_and_all_of_the_round_in_progress() -> None:
    retention = Retention()
    assert "b" not in retention.keeps(run(), 4, 50)
    assert retention.keeps(run(), 5, 50) is ALL
    assert retention.keeps(run(Status.CANCELLED), 5, 50) == ()
    assert "a" in retention.keeps(run(Status.DONE), 4, 50)
    assert retention.keeps(None, 0, 50) == ()


def spooled(folder: Path) -> set[str]:
    """The rounds and members whose uploads are there, e.g. '3/a'."""
    return {"/".join(path.relative_to(folder / "spools").parts[1:]) for path in (folder / "spools").glob("[!.]*/*/*")}


async def three_rounds(server: Server) -> str:
    for name in "ab":
        Member(server, name).attach()
    run = await server.engine.submit(make_plan(), "r1")
    await server.done(run)
    return run


@pytest.mark.parametrize(("rounds", "left"), [(2, {"2/a", "2/b", "3/a", "3/b"}), (0, set())])
async def test_a_run_leaves_the_uploads_of_its_last_rounds(tmp_path: Path, rounds: int, left: set[str]) -> None:
    async with serving(tmp_path, Retention(rounds=rounds)) as server:
        await three_rounds(server)
    assert spooled(tmp_path) == left


async def test_a_new_setting_is_heeded_at_the_next_start(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        await three_rounds(server)
        server.retention = Retention(rounds=1)
        await server.restart()
        assert spooled(tmp_path) == {"3/a", "3/b"}
        server.retention = Retention(seconds=0)
        await server.restart()
        assert spooled(tmp_path) == set()


async def test_an_upload_that_did_not_count_goes_with_the_commit(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        members = [Member(server, name) for name in "abc"]
        members[2].act["train"] = members[2].nothing
        for member in members:
            member.attach()
        plan = make_plan(rounds=1, cohort={"size": 2, "over_selection": 1.5})
        members[0].act["train"] = members[0].nothing
        run = await server.engine.submit(plan, "r1")
        order = await members[2].order("train")
        manifest, payload = members[2].payload(order, 1.0)
        spool = server.spools.open(run, 1, "c", manifest)
        spool.write(0, memoryview(payload)[:100])
        spool.close()
        await members[0].upload(await members[0].order("train"), 1.0)
        await server.done(run)
    assert spooled(tmp_path) == {"0/a", "1/a", "1/b"}


@pytest.fixture
def broken_off(request: pytest.FixtureRequest) -> Iterator[None]:
    """Die, as far as the sweep is concerned, at a failpoint."""

    def strike(name: str) -> None:
        if name == request.param:
            raise OSError("the power is gone")

    failpoints.listen(strike)
    yield
    failpoints.listen(None)


@pytest.mark.parametrize("broken_off", ["spool.drop", "spool.dropped"], indirect=True)
@pytest.mark.usefixtures("broken_off")
async def test_a_sweep_that_was_cut_off_is_finished_by_the_next(tmp_path: Path) -> None:
    async with serving(tmp_path, Retention(rounds=1)) as server:
        await three_rounds(server)
    # Of each round either all is there or nothing.
    assert {member for member in spooled(tmp_path) if member.startswith("3")} == {"3/a", "3/b"}
    assert len(list((tmp_path / "spools").iterdir())) + len(spooled(tmp_path)) > 4
    failpoints.listen(None)
    async with serving(tmp_path, Retention(rounds=1)):
        pass
    assert spooled(tmp_path) == {"3/a", "3/b"}
    assert sorted(path.name[0] for path in (tmp_path / "spools").iterdir() if path.name != KEEP) != ["."]


async def test_nothing_is_removed_while_it_is_read(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        run = await three_rounds(server)
        with server.spools.pinned(run, 2):
            await server.spools.sweep(lambda run, round_: ())
            assert spooled(tmp_path) == {"2/a", "2/b"}
        with shared(tmp_path / "spools" / KEEP), shared(tmp_path / "spools" / KEEP):
            await server.spools.sweep(lambda run, round_: ())
            assert spooled(tmp_path) == {"2/a", "2/b"}
            with exclusive(tmp_path / "spools" / KEEP) as alone:
                assert not alone
        await server.spools.sweep(lambda run, round_: ())
        assert spooled(tmp_path) == set()


async def test_kept_uploads_make_way_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is full as long as anything of round 1 is there: for an upload, then for the reduction."""
    from fsllm_server.store import blobs, spools

    async with serving(tmp_path) as server:
        a, b = Member(server, "a"), Member(server, "b")
        b.act["train"] = b.nothing
        a.attach()
        b.attach()
        run = await server.engine.submit(make_plan(rounds=2), "r1")
        await b.upload(await b.order("train"), 1.0)
        order = await b.order("train", 2)

        def demand(folder: Path, size: int) -> None:
            if spooled(tmp_path) & {"0/a", "1/a", "1/b"}:
                raise Unavailable("DISK_FULL", f"No space left for {folder}")

        monkeypatch.setattr(spools, "demand_space", demand)
        with pytest.raises(FsllmError) as full:
            await b.upload(order, 1.0)
        assert full.value.reason == "DISK_FULL"
        await server.engine.sweeper.settle()
        assert spooled(tmp_path) == {"2/a", "2/b"}
        # The next attempt finds room, and so would the reduction.
        rounds = server.spools.folder / run / "1" / "a"
        rounds.mkdir(parents=True)
        (rounds / "ff").touch()
        monkeypatch.setattr(blobs, "demand_space", demand)
        monkeypatch.setattr(spools, "demand_space", lambda folder, size: None)
        await b.upload(order, 1.0)
        await server.done(run)
    assert spooled(tmp_path) == {"2/a", "2/b"}
