"""A state folder that is not whole, or of another database, is refused before anything in it is lost."""

import shutil
import sqlite3
from pathlib import Path

import pytest
from tests.system.harness import CALL_SECONDS, ServerEnded, ServerProcess
from tests.system.peer import Peer, Tensors, join_all
from tests.system.runs import noop_plan, submit

from fsllm.v1 import control_pb2 as control
from fsllm_common.errors import Exit
from fsllm_common.failpoints import VARIABLE

pytestmark = pytest.mark.slow


def refused(state: Path, words: str, *arguments: str) -> None:
    """Start a server that has to end with a sentence about the state folder."""
    with pytest.raises(ServerEnded, match=words) as ended:
        ServerProcess(state, *arguments).start()
    assert ended.value.code == Exit.STORAGE
    assert "Traceback" not in ended.value.log


def test_uploads_outlive_a_start_over_another_database(tmp_path: Path) -> None:
    zero, delta = (Tensors.make(tmp_path, value, elements=3000) for value in (0.5, 1.0))
    with ServerProcess(tmp_path / "server") as server:
        anna, bert = server.enroll("anna"), server.enroll("bert")
        run = submit(server, noop_plan("anna", "bert", rounds=1))
        first, second = Peer(server, anna), Peer(server, bert)
        order, other = join_all([first, second], zero)
        first.deliver(order, delta)
        server.stop()
        refused(server.state, f"uploads of run {run}, which the database does not know", "--database", "sqlite:///"
                f"{tmp_path}/other.sqlite3")  # fmt: skip
        server.restart()
        again = Peer(server, bert)
        again.attach(other.order_id)
        again.deliver(other, delta)
        for notice in server.control().WatchRun(control.WatchRunRequest(run_id=run), timeout=CALL_SECONDS):
            last = notice
        assert last.subject == "done"


@pytest.mark.parametrize("name", ["authority/authority.pem", "federation"])
def test_without_its_authority_it_makes_no_other(tmp_path: Path, name: str) -> None:
    with ServerProcess(tmp_path / "server") as server:
        site = server.enroll("anna")
        server.stop()
        shutil.move(server.state / name, tmp_path / "away")
        for _ in range(2):
            refused(server.state, f"{name} is missing")
        shutil.move(tmp_path / "away", server.state / name)
        server.restart()
        Peer(server, site).attach()


def test_a_folder_where_a_file_should_be(tmp_path: Path) -> None:
    with ServerProcess(tmp_path / "server") as server:
        server.stop()
        (server.state / "federation").unlink()
        (server.state / "federation").mkdir()
        refused(server.state, "federation")
        (server.state / "federation").rmdir()
        (server.state / "layout").unlink()
        (server.state / "layout").mkdir()
        refused(server.state, "layout: Is a directory")


@pytest.mark.parametrize("point", ["file.sync", "folder.sync"])
def test_a_disk_that_fails_while_the_server_starts(point: str, tmp_path: Path) -> None:
    """Whichever of the first start's syncs it is, and however many starts have failed before."""
    server = ServerProcess(tmp_path / "server")
    endings: list[int] = []
    while not endings or endings[-1]:
        server.environment = {VARIABLE: f"{point}=eio@{len(endings) + 1}"}
        try:
            server.start()
        except ServerEnded as ended:
            endings.append(ended.code)
        else:
            endings.append(0)
    try:
        assert len(endings) > 3
        assert set(endings) == {Exit.STORAGE, 0}
        assert server.log.count("[DISK_FAILED]") == len(endings) - 1
        assert "Traceback" not in server.log
        Peer(server, server.enroll("anna")).attach()
    finally:
        server.kill()


def test_runs_hear_of_a_revocation_that_the_server_ended_in(tmp_path: Path) -> None:
    with ServerProcess(tmp_path / "server") as server:
        anna, bert = server.enroll("anna"), server.enroll("bert")
        run = submit(server, noop_plan("anna", "bert"))
        join_all([Peer(server, anna), Peer(server, bert)], Tensors.make(tmp_path, 0.5, elements=3000))
        server.kill()
        with sqlite3.connect(server.state / "fsllm.sqlite3") as database:
            database.execute("UPDATE members SET standing = 'revoked', revoked_at = 1 WHERE name = 'anna'")
        server.restart()
        members = server.control().GetRun(control.GetRunRequest(run_id=run), timeout=CALL_SECONDS).run.members
        assert [member.name for member in members] == ["bert"]
