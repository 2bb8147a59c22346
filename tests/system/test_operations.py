"""What an operator does with a server's state, with real processes: verify a run, back up, restore, upgrade."""

import json
import os
import subprocess
import sysconfig
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from tests.system.harness import CALL_SECONDS, ServerProcess
from tests.system.runs import await_done, expected, final, plan_for, submit, until
from tests.system.site_process import SiteProcess

from fsllm.v1 import control_pb2 as control
from fsllm_common.errors import Exit

pytestmark = pytest.mark.slow

ROUNDS = 30


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "rows.jsonl").write_text('{"instruction": "q", "output": "a"}\n')
    return tmp_path / "data"


@pytest.fixture
def federation(tmp_path: Path, data: Path) -> Iterator[tuple[ServerProcess, SiteProcess, SiteProcess]]:
    """A server that keeps the uploads of all rounds, and two sites."""
    with ExitStack() as stack:
        server = stack.enter_context(ServerProcess(tmp_path / "server", "--keep-spools-rounds", str(ROUNDS + 1)))
        sites = [stack.enter_context(SiteProcess(server, tmp_path / name, data)) for name in ("a", "b")]
        yield server, sites[0], sites[1]


def command(state: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run one of the installed commands, as on the server's host."""
    name, *rest = map(str, arguments)
    return subprocess.run(
        [f"{sysconfig.get_path('scripts')}/{name}", *rest],
        env=os.environ | {"FSLLM_STATE_DIR": str(state)},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def shown(server: ServerProcess, run: str) -> control.Run:
    return server.control().GetRun(control.GetRunRequest(run_id=run), timeout=CALL_SECONDS).run


def half_way(server: ServerProcess, a: SiteProcess, b: SiteProcess) -> tuple[str, control.Run]:
    """Kill b in the midst of a run and return the run once it waits for b with a's update acknowledged."""
    run = submit(server, plan_for(a, b, rounds=ROUNDS))
    until(server, run, "commit", "3")
    b.kill()
    for event in server.control().WatchRun(control.WatchRunRequest(run_id=run), timeout=60):
        if (event.kind, event.subject) == ("update", "a"):
            now = shown(server, run)
            if now.phase == "collect" and now.message.endswith("waiting for b"):
                return run, now
    raise AssertionError("the run ended without b")


def test_a_back_up_of_a_running_server_goes_on_elsewhere(
    federation: tuple[ServerProcess, SiteProcess, SiteProcess], tmp_path: Path
) -> None:
    server, a, b = federation
    run, before = half_way(server, a, b)
    archive = tmp_path / "backup.tar"
    done = command(server.state, "fsllm-server", "backup", archive)
    assert done.returncode == 0, done.stderr
    assert "keep it secret" in done.stdout
    assert archive.stat().st_mode & 0o777 == 0o600
    again = command(server.state, "fsllm-server", "backup", archive)
    assert again.returncode == Exit.CONFIGURATION
    # The old server's history goes on to its end, and then it is gone.
    b.start()
    old = await_done(server, run)
    result = final(server, run)
    server.kill()

    restored = tmp_path / "restored"
    told = command(restored, "fsllm-server", "restore", archive, "--state-dir", restored)
    assert told.returncode == 0, told.stderr
    assert "revoke them again" in told.stdout
    ports = ("--port", str(server.port), "--enrollment-port", str(server.told["enrollment_port"]))
    with ServerProcess(restored, "--keep-spools-rounds", str(ROUNDS + 1), *ports) as new:
        paused = shown(new, run)
        assert paused.status == control.RUN_STATUS_PAUSED
        assert "RUN_RESTORED" in paused.message
        assert list(paused.commits) == list(before.commits)
        assert len(paused.commits) < len(old.commits)
        resumed = command(restored, "fsllm", "run", "resume", run)
        assert resumed.returncode == 0, resumed.stderr
        finished = await_done(new, run)
        # Both sites delivered the same again: bit for bit what it was, under another epoch.
        assert [c.version for c in finished.commits] == [c.version for c in old.commits]
        np.testing.assert_array_equal(final(new, run), result)
        np.testing.assert_allclose(result, expected((a, b), ROUNDS), rtol=1e-5, atol=1e-5)
        verified = command(restored, "fsllm", "run", "verify", run, "--json")
        assert verified.returncode == 0, verified.stderr
        assert {one["verdict"] for one in json.loads(verified.stdout)} == {"recomputed"}


def test_a_run_is_verified_and_what_was_changed_is_named(
    federation: tuple[ServerProcess, SiteProcess, SiteProcess], tmp_path: Path
) -> None:
    server, a, b = federation
    run = submit(server, plan_for(a, b, wire={"element_type": "bf16"}))
    await_done(server, run)
    good = command(server.state, "fsllm", "run", "verify", run)
    assert good.returncode == 0, good.stdout + good.stderr
    assert good.stdout.count("recomputed") == 4
    adapter = tmp_path / "adapter"
    exported = command(server.state, "fsllm", "run", "export", run, "-o", adapter)
    assert exported.returncode == 0, exported.stderr
    manifests = json.loads((adapter / "manifests.json").read_text())
    assert [one["manifest"]["round"] for one in manifests] == [0, 1, 2, 3]
    assert manifests == json.loads(command(server.state, "fsllm", "run", "show", run, "--json").stdout)["manifests"]
    against = ("--against", adapter / "manifests.json")
    assert command(server.state, "fsllm", "run", "verify", run, *against).returncode == 0
    assert manifests[-1]["digest"] in good.stdout

    (upload,) = (path for path in (server.state / "spools" / run / "2" / "a").iterdir() if not path.suffix)
    changed = bytearray(upload.read_bytes())
    changed[len(changed) // 2] ^= 1
    upload.write_bytes(changed)
    bad = command(server.state, "fsllm", "run", "verify", run, "--json")
    assert bad.returncode == Exit.STORAGE
    assert "ROUND_BROKEN" in bad.stderr
    assert "round 2 " in bad.stderr
    found = {one["round"]: (one["verdict"], one["problems"]) for one in json.loads(bad.stdout)}
    assert [verdict for verdict, _ in found.values()] == ["recomputed", "recomputed", "BROKEN", "recomputed"]
    assert "the upload of a: its digest is" in found[2][1][0]
    shown_ = command(server.state, "fsllm", "run", "verify", run, "--round", "2")
    assert shown_.returncode == Exit.STORAGE
    assert "BROKEN" in shown_.stdout
    assert "the upload of a" in shown_.stdout

    # Another server's story does not pass for this one's.
    manifests[1]["manifest"]["updates"][0]["weight"] = 0.25
    (tmp_path / "other.json").write_text(json.dumps(manifests))
    other = command(server.state, "fsllm", "run", "verify", run, "--round", "1", "--against", tmp_path / "other.json")
    assert other.returncode == Exit.STORAGE
    assert "another than in the copy" in other.stdout
    (tmp_path / "none.json").write_text("[1]")
    none = command(server.state, "fsllm", "run", "verify", run, "--against", tmp_path / "none.json")
    assert none.returncode == Exit.CONFIGURATION
