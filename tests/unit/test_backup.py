"""Back-up and restoration of a state folder, and everything that an archive may suffer in between."""

import contextlib
import json
import os
import shutil
import sqlite3
import tarfile
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from engine_harness import Member, Server, make_plan

from fsllm.v1 import control_pb2
from fsllm_common.errors import Exit, FsllmError, SettingsInvalid
from fsllm_common.layout import FILE
from fsllm_server import backup
from fsllm_server.backup import back_up, restore
from fsllm_server.certificates import open_authority
from fsllm_server.cli import main
from fsllm_server.engine.events import dump
from fsllm_server.store.folder import DATABASE, StateFolder
from fsllm_server.store.layout import LAYOUT, RESTORING
from fsllm_server.store.restored import RESTORED, Restoration, forget


class Folder(Server):
    """The engine over a whole state folder, as the server has it."""

    def open(self) -> None:
        self.state = StateFolder(self.folder)
        open_authority(self.folder, None, known=False)
        if (self.folder / DATABASE).exists():
            (self.folder / DATABASE).rename(self.folder / "db.sqlite3")
        super().open()
        # The harness has its own name for the database; the engine starts with what a restoration has left.
        start, note = self.engine.start, self.folder / RESTORED

        async def starting(restoration: Restoration | None = None) -> None:
            await start(restoration or Restoration.load(note))
            forget(note)

        self.engine.start = starting  # type: ignore[method-assign]

    async def __aexit__(self, *_: object) -> None:
        await super().__aexit__()
        self.state.close()

    def back_up(self, target: Path) -> backup.BackedUp:
        return back_up(self.folder, self.folder / "db.sqlite3", target)


async def half_a_run(server: Server) -> tuple[str, Member, Member]:
    """Commit round 1 of three; of round 2 a's update is acknowledged and b trains."""
    a, b = Member(server, "a", value=1).attach(), Member(server, "b", value=3)
    train = b.do_train

    async def once(order: Any) -> None:  # noqa: ANN401
        if order.round == 1:
            await train(order)

    b.act["train"] = once
    b.attach()
    run = await server.engine.submit(make_plan(wire={"element_type": "bf16"}), "r1")
    await server.until(run, lambda n: (n.kind, n.subject, n.round) == ("update", "a", 2))
    await b.order("train", 2)
    return run, a, b


async def test_a_run_goes_on_from_its_back_up(tmp_path: Path) -> None:
    archive = tmp_path / "backup.tar"
    async with Folder(tmp_path / "old") as old:
        run, _, b = await half_a_run(old)
        before = old.engine.get_run(run)
        done = old.back_up(archive)
        assert (done.federation, done.runs) == ("fsllm", 1)
        # The old server goes on, and its members with it.
        await b.upload(b.of("train")[1], 3.0)
        await b.upload(await b.order("train", 3), 3.0)
        finished = await old.done(run)
    assert archive.stat().st_mode & 0o777 == 0o600

    again = restore(archive, tmp_path / "new")
    assert (again.made, again.runs, again.files, again.size) == (done.made, done.runs, done.files, done.size)
    async with Folder(tmp_path / "new") as new:
        paused = new.engine.get_run(run)
        assert paused.status == control_pb2.RUN_STATUS_PAUSED
        assert done.made in paused.message
        assert "RUN_RESTORED" in paused.message
        assert list(paused.commits) == list(before.commits)
        a2, b2 = Member(new, "a", value=1), Member(new, "b", value=3)
        b2.held = [b.of("train")[2].order_id]  # of round 3, which is not known here
        a2.attach()
        b2.attach()
        await new.engine.resume(run)
        result = await new.done(run)
        # a's update of round 2 was acknowledged: only b is asked for it.
        assert [order.round for order in a2.of("train")] == [3]
        assert [order.round for order in b2.of("train")] == [2, 3]
        assert [w.order_id for w in b2.withdrawn] == b2.held
        # The same updates give the same bits, under other names of orders.
        assert [c.version for c in result.commits] == [c.version for c in finished.commits]
        names = {order.order_id for order in (*a2.orders, *b2.orders)}
        assert not names & {order.order_id for order in b.orders}
        epochs = [json.loads(m.body)["epoch"] for m in new.engine.manifests(run)]
        assert epochs[:2] == ["", ""]
        assert len(set(epochs[2:])) == 1
        assert epochs[2]
        verdicts = [f.finding.verdict async for f in new.engine.verify(run, None) if f.HasField("finding")]
        assert verdicts == [control_pb2.ROUND_VERDICT_CHAIN_ONLY, *[control_pb2.ROUND_VERDICT_RECOMPUTED] * 3]
        # Started once more, it is no longer a restored one.
        await new.restart()
        assert not (tmp_path / "new" / RESTORED).exists()
        assert list(new.engine.get_run(run).commits) == list(result.commits)


async def test_a_restoration_is_told_once_even_if_the_first_start_is_cut_off(tmp_path: Path) -> None:
    async with Folder(tmp_path / "old") as old:
        run, *_ = await half_a_run(old)
        old.back_up(tmp_path / "backup.tar")
    restore(tmp_path / "backup.tar", tmp_path / "new")
    note = (tmp_path / "new" / RESTORED).read_bytes()
    async with Folder(tmp_path / "new") as new:
        await new.engine.resume(run)
        (tmp_path / "new" / RESTORED).write_bytes(note)
        await new.restart()
        assert new.engine.get_run(run).status == control_pb2.RUN_STATUS_RUNNING


async def test_two_restorations_of_one_back_up_give_out_different_names(tmp_path: Path) -> None:
    async with Folder(tmp_path / "old") as old:
        run, *_ = await half_a_run(old)
        old.back_up(tmp_path / "backup.tar")
    orders = []
    for name in ("one", "two"):
        restore(tmp_path / "backup.tar", tmp_path / name)
        async with Folder(tmp_path / name) as new:
            b = Member(new, "b")
            b.act["train"] = b.nothing
            b.attach()
            Member(new, "a").attach()
            await new.engine.resume(run)
            orders.append((await b.order("train")).order_id)
    assert len(set(orders)) == 2


async def test_what_the_snapshot_names_is_in_the_archive_though_it_is_swept_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Folder(tmp_path / "old") as old:
        run, *_ = await half_a_run(old)
        # Right after the snapshot, before any file is copied, retention shrinks to nothing.
        taken = backup._runs

        def runs(database: Path) -> Any:  # noqa: ANN401
            found = taken(database)
            for member in (tmp_path / "old" / "spools" / run / "1").iterdir():
                assert member.is_dir()
            left = old.spools.sweep(lambda run, round_: ())
            with pytest.raises(StopIteration):
                left.send(None)  # type: ignore[attr-defined]
            return found

        monkeypatch.setattr(backup, "_runs", runs)
        old.back_up(tmp_path / "backup.tar")
    with tarfile.open(tmp_path / "backup.tar") as tar:
        names = set(tar.getnames())
    assert {f"spools/{run}/{round_}/a" for round_ in "12"} <= {str(Path(name).parent) for name in names}
    assert "authority/authority.pem" in names
    assert not {"lock", "server.json", RESTORED} & names


async def test_a_missing_version_is_named_and_no_file_is_left(tmp_path: Path) -> None:
    async with Folder(tmp_path / "old") as old:
        run, *_ = await half_a_run(old)
        (tmp_path / "old" / "blobs" / old.engine.get_run(run).commits[0].version.digest.hex() / "payload").unlink()
        with pytest.raises(FsllmError) as missing:
            old.back_up(tmp_path / "backup.tar")
    assert missing.value.reason == "STATE_CORRUPT"
    assert "payload is missing" in missing.value.message
    assert os.listdir(tmp_path) == ["old"]


@pytest.fixture
async def archive(tmp_path: Path) -> Path:
    async with Folder(tmp_path / "old") as old:
        await half_a_run(old)
        old.back_up(tmp_path / "backup.tar")
    return tmp_path / "backup.tar"


def test_nothing_is_replaced(archive: Path, tmp_path: Path) -> None:
    before = archive.read_bytes()
    with pytest.raises(SettingsInvalid, match="exists"):
        back_up(tmp_path / "old", tmp_path / "old" / "db.sqlite3", archive)
    assert archive.read_bytes() == before
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "mine").touch()
    with pytest.raises(SettingsInvalid, match="not empty"):
        restore(archive, tmp_path / "new")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["mine"]


def test_any_flipped_bit_of_what_counts_is_found(archive: Path, tmp_path: Path) -> None:
    good = archive.read_bytes()
    with tarfile.open(archive) as tar:
        places = [(m.name, m.offset_data + m.size // 2) for m in tar if m.size] + [(m.name, m.offset) for m in tar]
    for number, (name, at) in enumerate(places):
        bad = bytearray(good)
        bad[at] ^= 0x10
        archive.write_bytes(bad)
        state = tmp_path / f"new{number}"
        with pytest.raises(FsllmError) as refused:
            restore(archive, state)
        assert refused.value.reason in ("BACKUP_INVALID", "STATE_NEWER"), name
        # No server starts from what is there, if anything is.
        if state.exists():
            with pytest.raises(FsllmError) as corrupt:
                StateFolder(state)
            assert corrupt.value.reason == "STATE_CORRUPT"


def test_an_archive_that_was_cut_off_is_found(archive: Path, tmp_path: Path) -> None:
    good = archive.read_bytes()
    with tarfile.open(archive) as tar:
        ends = [m.offset for m in tar][1:] + [m.offset_data + 1 for m in tar if m.size > 1]
    for number, end in enumerate([0, 100, *ends]):
        archive.write_bytes(good[:end])
        with pytest.raises(FsllmError) as refused:
            restore(archive, tmp_path / f"new{number}")
        assert refused.value.reason == "BACKUP_INVALID", end


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("../out", tarfile.REGTYPE),
        ("/tmp/out", tarfile.REGTYPE),  # noqa: S108
        ("blobs/../../out", tarfile.REGTYPE),
        ("link", tarfile.SYMTYPE),
        ("hard", tarfile.LNKTYPE),
        ("pipe", tarfile.FIFOTYPE),
        ("null", tarfile.CHRTYPE),
        ("federation", tarfile.REGTYPE),
        ("federation/x", tarfile.REGTYPE),
        (RESTORING, tarfile.REGTYPE),
        (RESTORED, tarfile.REGTYPE),
    ],
)
def test_an_archive_made_to_do_harm_does_none(archive: Path, tmp_path: Path, name: str, kind: bytes) -> None:
    evil = tmp_path / "evil.tar"
    with tarfile.open(archive) as good, tarfile.open(evil, "w") as out:
        for member in good:
            if member.name == backup.DIGESTS:
                bad = tarfile.TarInfo(name)
                bad.type, bad.linkname, bad.size = kind, "/etc/passwd", 3 if kind == tarfile.REGTYPE else 0
                out.addfile(bad, BytesIO(b"bad"))
            out.addfile(member, good.extractfile(member))
    before = sorted(tmp_path.iterdir())
    with pytest.raises(FsllmError) as refused:
        restore(evil, tmp_path / "new")
    assert refused.value.reason == "BACKUP_INVALID"
    assert sorted(path for path in tmp_path.iterdir() if path.name != "new") == before


async def test_a_back_up_of_the_future(tmp_path: Path) -> None:
    async with Folder(tmp_path / "old") as old:
        await half_a_run(old)
        (tmp_path / "old" / FILE).write_text(f"{LAYOUT.newest + 1}\n")
        with pytest.raises(FsllmError) as newer:
            old.back_up(tmp_path / "backup.tar")
        assert newer.value.reason == "STATE_NEWER"
    with pytest.raises(FsllmError) as newer:
        StateFolder(tmp_path / "old")
    assert newer.value.reason == "STATE_NEWER"
    # The refused start has not kept the folder.
    (tmp_path / "old" / FILE).write_text(f"{LAYOUT.newest}\n")
    StateFolder(tmp_path / "old").close()


def test_a_layout_that_is_no_number(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text("two\n")
    with pytest.raises(FsllmError) as corrupt:
        StateFolder(tmp_path)
    assert corrupt.value.reason == "STATE_CORRUPT"


def make_old(folder: Path) -> None:
    """Make of a state folder what fsllm 0.1.0 would have left: layout 1, schema 0001, its events."""
    (folder / FILE).unlink()
    with contextlib.closing(sqlite3.connect(folder / "db.sqlite3")) as database, database:
        for run, sequence, body in database.execute("SELECT run_id, sequence, body FROM events").fetchall():
            event = json.loads(body)
            event.pop("element_type", None)
            database.execute(
                "UPDATE events SET body = ? WHERE run_id = ? AND sequence = ?", (json.dumps(event), run, sequence)
            )
        database.execute("ALTER TABLE events DROP COLUMN manifest")
        database.execute("UPDATE alembic_version SET version_num = '0001'")
    for spools in (folder / "spools").glob("*/[01]"):
        shutil.rmtree(spools)


@pytest.mark.slow
async def test_a_state_folder_of_the_first_release_is_carried_on(tmp_path: Path) -> None:
    async with Folder(tmp_path / "state") as server:
        run, *_ = await half_a_run(server)
        before = server.engine.get_run(run)
    make_old(tmp_path / "state")
    async with Folder(tmp_path / "state") as server:
        assert (tmp_path / "state" / FILE).read_text() == f"{LAYOUT.newest}\n"
        after = server.engine.get_run(run)
        assert [c.version for c in after.commits] == [c.version for c in before.commits]
        assert [c.contributions for c in after.commits] == [c.contributions for c in before.commits]
        for name, value in (("a", 1), ("b", 3)):
            Member(server, name, value=value).attach()
        done = await server.done(run)
        assert [c.member for c in done.commits[2].contributions] == ["a", "b"]
        found = [f.finding async for f in server.engine.verify(run, None) if f.HasField("finding")]
        assert [f.verdict for f in found] == [
            *[control_pb2.ROUND_VERDICT_CHAIN_ONLY] * 2,
            *[control_pb2.ROUND_VERDICT_RECOMPUTED] * 2,
        ]
        assert [bool(f.manifest.digest) for f in found] == [False, False, True, True]
        assert "recorded no manifests" in found[0].note
        # Migrated once; and a version that was committed by the old release can be fetched.
        assert server.engine.version(run, 1).manifest.payload_bytes == 128
        await server.restart()
        assert list(server.engine.get_run(run).commits) == list(done.commits)


def test_the_commands_refuse_what_makes_no_sense(tmp_path: Path) -> None:
    def end(*arguments: str | Path) -> tuple[int, str]:
        result = CliRunner(env={"FSLLM_STATE_DIR": None}).invoke(main, [str(a) for a in arguments])
        assert isinstance(result.exception, SystemExit), result.exception
        return result.exit_code, result.output

    target = tmp_path / "x.tar"
    code, said = end("backup", target, "--state-dir", tmp_path)
    assert code == Exit.CONFIGURATION
    assert "holds no server's state" in said
    code, said = end("backup", target, "--state-dir", tmp_path, "--database", "postgresql://u:secret@h/d")
    assert code == Exit.CONFIGURATION
    assert "docs/operations.md" in said
    assert "secret" not in said
    target.write_bytes(os.urandom(3000))
    code, said = end("restore", target, "--state-dir", tmp_path / "new")
    assert code == Exit.STORAGE
    assert "BACKUP_INVALID" in said
    assert not target.with_name("new").exists()


def test_the_restored_event_reads_back() -> None:
    from fsllm_server.engine.events import Restored, load

    event = Restored(at=1.0, epoch="ab", made="2026-01-01T00:00:00+00:00")
    assert load(dump(event)) == event
