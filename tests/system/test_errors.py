"""What a person meets when something is wrong: what, where, what to do, a documented exit code; and nothing is lost.

Errors of TLS and enrolment as gRPC carries them are in test_server_access; here are the commands' own words.
"""

import json
import os
import shutil
import socket
import stat
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from tests.system.harness import CALL_SECONDS, ServerEnded, ServerProcess
from tests.system.runs import await_done, events, expected, final, plan_for, submit, until
from tests.system.site_process import SiteProcess, join_file

from fsllm.v1 import control_pb2 as control
from fsllm.v1.control_pb2_grpc import ControlServiceStub
from fsllm_common.errors import Exit
from fsllm_common.identity.join import JoinFile, write_join_file

pytestmark = pytest.mark.slow

Disk = Callable[[str, int], Path]
MIB = 2**20


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with ServerProcess(tmp_path_factory.mktemp("fsllm") / "server") as server:
        yield server


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n')
    return path


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    """Make small disks; given again, a name's disk gets another size."""
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("only root can mount a small disk")
    mounted: list[Path] = []

    def make(name: str, size: int) -> Path:
        folder = tmp_path / name
        option = f"size={size}"
        if folder in mounted:
            option = f"remount,{option}"
        else:
            folder.mkdir()
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", option, "tmpfs", str(folder)], check=False)
        if done.returncode and folder not in mounted:
            pytest.skip("no small disk can be mounted here")
        mounted.append(folder)
        return folder

    yield make
    for folder in set(mounted):
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def client(server: ServerProcess, state: Path, data: Path, *arguments: str) -> tuple[int, str]:
    """Run the daemon where it ends by itself; return its exit code and what its terminal shows, less the log."""
    command = [sys.executable, "-c", "from fsllm_client.cli import main; main()", "--server", server.address]
    command += ["--data", str(data), "--state-dir", str(state), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    return done.returncode, "".join(line for line in done.stderr.splitlines(keepends=True) if line[:1] != "{")


def fsllm(server: ServerProcess, *arguments: str) -> tuple[int, str]:
    """Run the operator's command; return its exit code and what it says."""
    command = [f"{sysconfig.get_path('scripts')}/fsllm", *arguments]
    environment = os.environ | {"FSLLM_STATE_DIR": str(server.state)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    return done.returncode, done.stdout + done.stderr


def changed(path: Path, **fields: object) -> Path:
    """Write a join file with other content beside one."""
    other = path.with_suffix(".changed")
    content = json.loads(path.read_text()) | fields
    write_join_file(other, JoinFile.model_validate_json(json.dumps(content)))
    return other


def fill(path: Path) -> None:
    """Write a file until its disk is full to the last page."""
    with path.open("wb", buffering=0) as file, suppress(OSError):
        while file.write(bytes(4096)):
            pass


def run_of(server: ServerProcess, run: str) -> control.Run:
    return server.control().GetRun(control.GetRunRequest(run_id=run), timeout=CALL_SECONDS).run


# Join files.


def test_a_join_file_used_by_another(server: ServerProcess, tmp_path: Path, data: Path) -> None:
    with SiteProcess(server, tmp_path / "first", data) as site:
        site.await_log("attached")
        code, told = client(server, tmp_path / "second", data, "--join", str(tmp_path / "first.join"))
        assert code == Exit.IDENTITY
        assert told.startswith(
            "Error: The join token of first has been used [JOIN_TOKEN_USED]\n  A join file works once."
        )
        # The one whose file it was has noticed nothing.
        await_done(server, submit(server, plan_for(site)))


def test_a_join_file_that_comes_late_by_the_sites_clock(server: ServerProcess, tmp_path: Path, data: Path) -> None:
    path = join_file(server, "late", tmp_path / "late.join")
    late = changed(path, expires="2026-01-01T00:00:00Z")
    code, told = client(server, tmp_path / "late", data, "--join", str(late))
    assert code == Exit.IDENTITY
    assert f"Error: {late} expired at 2026-01-01 00:00 UTC [JOIN_TOKEN_EXPIRED]" in told
    assert "`fsllm site invite NAME -o FILE`" in told


def test_a_site_that_claims_anothers_name(server: ServerProcess, tmp_path: Path, data: Path) -> None:
    server.enroll("honest")
    path = join_file(server, "mallory", tmp_path / "mallory.join")
    code, told = client(server, tmp_path / "mallory", data, "--join", str(changed(path, name="honest")))
    assert code == Exit.IDENTITY
    assert "it says site honest, but its token is for spiffe://fsllm/site/mallory [JOIN_FILE_INVALID]" in told
    # The invitation is not lost: as it was made, it works.
    site = SiteProcess(server, tmp_path / "mallory", data)
    site.start("--join", str(path))
    assert site.await_log("attached")["member"] == "mallory"
    assert site.stop() == 0


def test_an_operators_join_file_is_not_spent_at_a_site(server: ServerProcess, tmp_path: Path, data: Path) -> None:
    path = join_file(server, "carol", tmp_path / "carol.join", role="operator")
    code, told = client(server, tmp_path / "carol", data, "--join", str(path))
    assert code == Exit.IDENTITY
    assert "is for the operator 'carol', not for a site or evaluator [JOIN_FILE_INVALID]" in told
    assert "fsllm login --join FILE" in told
    home = tmp_path / "home"
    home.mkdir()
    environment = {**os.environ, "HOME": str(home), "XDG_CONFIG_HOME": str(home / "config")}
    command = [f"{sysconfig.get_path('scripts')}/fsllm", "login", "--join", str(path)]
    subprocess.run(command, env=environment, check=True, timeout=60, capture_output=True)


# Plans, settings, ports, models.


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"train": {"step": 3}}, "train.step: unknown key; did you mean 'steps'?"),
        ({"algorithm": {"name": "fedavgg"}}, "algorithm.name: unknown algorithm 'fedavgg'; did you mean 'fedavg'?"),
        ({"cohort": {"quorum": 3, "size": 2}}, "cohort.size, cohort.quorum: a round would end with fewer updates"),
    ],
)
def test_a_plan_that_is_wrong_starts_nothing(
    server: ServerProcess, tmp_path: Path, change: dict[str, object], told: str
) -> None:
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps({"name": "wrong", "rounds": 1, "model": {"name": "embedded"}, **change}))
    code, said = fsllm(server, "run", "submit", str(plan))
    assert code == Exit.CONFIGURATION
    first, second = said.splitlines()
    assert first.startswith(f"Error: {plan}: {told}")
    assert first.endswith("[PLAN_INVALID]")
    assert "docs/plans.md" in second
    runs = server.control().ListRuns(control.ListRunsRequest(), timeout=CALL_SECONDS).runs
    assert "wrong" not in [run.name for run in runs]
    with pytest.raises(ServerEnded) as ended:
        ServerProcess(tmp_path / "server", "--run", str(plan)).start()
    assert ended.value.code == Exit.CONFIGURATION
    assert told in ended.value.log
    assert not (tmp_path / "server").exists()


def test_a_port_in_use_at_a_site(server: ServerProcess, tmp_path: Path, data: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, told = client(server, tmp_path / "site", data, "--metrics-port", str(port))
    assert code == Exit.UNAVAILABLE
    assert f"--metrics-port: 127.0.0.1:{port} can not be opened: Address already in use [PORT_IN_USE]" in told


def test_an_address_that_is_not_this_hosts(tmp_path: Path) -> None:
    with pytest.raises(ServerEnded) as ended:
        ServerProcess(tmp_path / "server", "--listen", "192.0.2.1").start()
    assert ended.value.code == Exit.CONFIGURATION
    assert "Error: --listen, --port: 192.0.2.1:0 can not be opened" in ended.value.log


def test_a_model_that_is_not_there(server: ServerProcess, tmp_path: Path, data: Path) -> None:
    with SiteProcess(server, tmp_path / "bare", data) as site:
        site.await_log("attached")
        run = submit(server, plan_for(site, model={"name": "smollm2"}, algorithm={"name": "fedavg"}))
        until(server, run, "member", site.name)
        site.await_log("order declined")
        (member,) = run_of(server, run).members
        policy = site.state / "policy.toml"
        why = f"{policy} line 5: models names no model 'smollm2'; it has embedded"
        assert (member.standing, member.message) == ("declined", why)
        code, shown = fsllm(server, "run", "show", run)
        assert code == 0
        assert why in " ".join(shown.split())
        # The daemon lives, and its log says what to do.
        assert "name its folder in the site's policy" in site.await_log("join order not done")["cure"]
        await_done(server, submit(server, plan_for(site)))


# Full disks.


def test_a_full_disk_at_the_server(tmp_path: Path, data: Path, disk: Disk) -> None:
    folder = disk("server-disk", 24 * MIB)
    with ServerProcess(folder / "server") as server, SiteProcess(server, tmp_path / "site", data) as site:
        site.await_log("attached")
        tensors = {"name": "noop", "weighting": "uniform", "synthetic": {"tensors": 5, "mebibytes": 8}}
        run = submit(server, plan_for(site, algorithm=tensors))
        paused = next(e for e in events(server, run) if e.kind == "status" and e.subject == "paused")
        assert paused.message.startswith(f"No space left for {server.state / 'blobs'}: 8388608 bytes needed")
        assert "[DISK_FULL]" in run_of(server, run).message
        assert json.loads(server.await_log('"subject": "paused"'))["level"] == "warning"
        # Not a byte is left: nothing that must be recorded is accepted, and the server says so and lives.
        fill(folder / "filler")
        code, told = fsllm(server, "run", "resume", run)
        assert code == Exit.STORAGE
        assert f"no space left for the database {server.state / 'fsllm.sqlite3'} [DISK_FULL]\n  Free space" in told
        server.stop()
        with pytest.raises(ServerEnded, match=r"\[DISK_FULL\]") as ended:
            server.restart()
        assert ended.value.code == Exit.STORAGE
        (folder / "filler").unlink()
        disk("server-disk", 96 * MIB)
        server.start()
        site.await_log("attached", 2)
        assert fsllm(server, "run", "resume", run)[0] == 0
        await_done(server, run)
        np.testing.assert_allclose(final(server, run), expected((site,), 3, mebibytes=8), rtol=0, atol=2e-6)
        # Version 0 and three rounds: what was acknowledged before was not asked for again.
        assert site.log.count('"event": "delivered"') == 4


def test_a_full_disk_at_a_site(server: ServerProcess, tmp_path: Path, data: Path, disk: Disk) -> None:
    folder = disk("site-disk", 12 * MIB)
    with SiteProcess(server, folder / f"site-{os.getpid()}", data) as site:
        site.await_log("attached")
        tensors = {"name": "noop", "weighting": "uniform", "synthetic": {"tensors": 5, "mebibytes": 8}}
        run = submit(server, plan_for(site, algorithm=tensors))
        next(e for e in events(server, run) if e.kind == "status" and e.subject == "paused")
        said = run_of(server, run)
        assert f"({site.name}: train failed: No space left for {site.state / 'outbox'}" in said.message
        assert "[QUORUM_NOT_REACHED]" in said.message
        warning = site.await_log("train order not done")
        assert (warning["reason"], warning["cure"][:10]) == ("DISK_FULL", "Free space")
        # Half a payload would keep the disk full.
        assert not list((site.state / "outbox").iterdir())
        disk("site-disk", 64 * MIB)
        code, _ = fsllm(server, "run", "resume", run)
        assert code == 0
        await_done(server, run)
        np.testing.assert_allclose(final(server, run), expected((site,), 3, mebibytes=8), rtol=0, atol=2e-6)


# Callers who leave.


def test_a_caller_who_leaves_an_export_is_no_bug(server: ServerProcess, tmp_path: Path, data: Path) -> None:
    with SiteProcess(server, tmp_path / "leaving", data) as site:
        site.await_log("attached")
        run = submit(server, plan_for(site))
        await_done(server, run)
    with server.channel(server.operator()) as channel:
        stub = ControlServiceStub(channel)
        for _ in range(5):
            export = stub.ExportRun(control.ExportRunRequest(run_id=run), timeout=CALL_SECONDS)
            next(export)
            export.cancel()
        stub.GetRun(control.GetRunRequest(run_id=run), timeout=CALL_SECONDS)
    assert "failed by a bug" not in server.log


# Secrets.


def test_no_secret_is_readable_or_told(tmp_path: Path, data: Path) -> None:
    with (
        ServerProcess(tmp_path / "server", "--log-level", "debug") as server,
        SiteProcess(server, tmp_path / "site", data, "--log-level", "debug") as site,
    ):
        site.await_log("attached")
        await_done(server, submit(server, plan_for(site)))
        for state in (server.state, site.state):
            modes = {path: stat.S_IMODE(path.lstat().st_mode) for path in (state, *state.rglob("*"))}
            assert not {path: oct(mode) for path, mode in modes.items() if mode & 0o077}
        keys = [line for path in tmp_path.rglob("*.pem") for line in path.read_text().splitlines() if len(line) > 40]
        secrets = [*keys, json.loads((tmp_path / "site.join").read_text())["token"].rpartition(".")[2]]
        assert len(secrets) > 4
        commands = [Path(f"/proc/{p.process.pid}/cmdline").read_text() for p in (server, site)]
        environments = [Path(f"/proc/{p.process.pid}/environ").read_text() for p in (server, site)]
        told = "".join([server.log, server.output.read_text(), site.log, *commands, *environments])
        assert not [secret for secret in secrets if secret in told]
        assert "rows.jsonl" not in server.log
