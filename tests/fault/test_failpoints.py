"""Every failpoint, in real processes: the server or a site is killed exactly there, and the runs end right."""

import json
import signal
import sqlite3
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import numpy as np
import pytest
from tests.fault.federation import lines
from tests.system.harness import CALL_SECONDS, ServerEnded, ServerProcess
from tests.system.runs import await_done, expected, final, plan_for, submit
from tests.system.site_process import SiteProcess

from fsllm.v1 import control_pb2 as control
from fsllm_common.failpoints import NAMES, VARIABLE

pytestmark = pytest.mark.slow

MEBIBYTES = 2.5
ROUNDS = 4
SITE = ("receipt.received", "parcel.")
NOT_HERE = ("ledger.",)
"""Only a run that trains with noise writes to the privacy ledger."""
BOTH = ("file.", "folder.")
"""Of both: a site is killed there, and the server in `make chaos`."""

AT_SERVER = [name for name in sorted(NAMES) if not name.startswith((*SITE, *BOTH, *NOT_HERE))]
AT_SITE = [name for name in sorted(NAMES) if name.startswith((*SITE, *BOTH))]


@dataclass
class Federation:
    """A server and two sites, with one run after the other."""

    server: ServerProcess
    sites: tuple[SiteProcess, SiteProcess]
    submitted: int = field(default=0)

    def keep_busy(self) -> None:
        """Start a run when there is none under way; the server may be killed at any moment."""
        with suppress(grpc.RpcError):
            runs = self.server.control().ListRuns(control.ListRunsRequest(), timeout=CALL_SECONDS).runs
            if all(run.status == control.RUN_STATUS_DONE for run in runs):
                self.submitted += 1
                tensors = {"name": "noop", "weighting": "uniform", "synthetic": {"tensors": 5, "mebibytes": MEBIBYTES}}
                submit(self.server, plan_for(*self.sites, rounds=ROUNDS, seed=self.submitted, algorithm=tensors))

    def start_server(self, point: str = "") -> bool:
        """Start the server, armed with a failpoint; return whether it came so far as to serve."""
        self.server.environment = {VARIABLE: point} if point else {}
        try:
            self.server.restart()
        except ServerEnded as ended:
            if ended.code != -signal.SIGKILL:
                raise
            return False
        return True

    def await_kill(self, armed: ServerProcess | SiteProcess) -> None:
        """Let runs go on until an armed process has struck itself."""
        for _ in range(120):
            self.keep_busy()
            with suppress(subprocess.TimeoutExpired):
                assert armed.process.wait(0.5) == -signal.SIGKILL
                return
        raise AssertionError("the failpoint is never reached")


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    """At the end every run must have ended with the exact result, each update recorded and made once."""
    folder = tmp_path_factory.mktemp("fsllm")
    data = folder / "rows.jsonl"
    data.write_text('{"prompt": "a", "completion": "b"}\n')
    with (
        ServerProcess(folder / "server") as server,
        SiteProcess(server, folder / "site-0", data) as a,
        SiteProcess(server, folder / "site-1", data) as b,
    ):
        for site in (a, b):
            site.await_log("attached")
        running = Federation(server, (a, b))
        yield running
        if server.process.poll() is not None:
            running.start_server()
        if a.process.poll() is not None:
            a.environment = {}
            a.start()
        running.keep_busy()
        runs = server.control().ListRuns(control.ListRunsRequest(), timeout=CALL_SECONDS).runs
        assert runs
        for listed in runs:
            done = await_done(server, listed.run_id)
            seed = server_seed(done)
            result = expected((a, b), ROUNDS, seed, MEBIBYTES)
            np.testing.assert_allclose(final(server, listed.run_id), result, rtol=0, atol=2e-6)
        with sqlite3.connect(f"file:{server.state / 'fsllm.sqlite3'}?mode=ro", uri=True) as database:
            recorded = database.execute(
                "SELECT count(*), count(DISTINCT run_id || json_extract(body, '$.round') || json_extract(body, "
                "'$.member')) FROM events WHERE kind = 'update'"
            ).fetchone()
        assert recorded == (len(runs) * (1 + 2 * ROUNDS),) * 2
        for site in (a, b):
            made = [(line["run"], line["round"]) for line in lines(site.log, MADE)]
            assert len(made) == len(set(made))
            await_empty(site.state / "outbox")
        for process in (server, a, b):
            assert "Traceback" not in process.log


MADE = "made, and kept until it is acknowledged"


def await_empty(folder: Path) -> None:
    """Wait until a site has let go of what it was killed with, although the server had it."""
    until = time.monotonic() + 60
    while left := list(folder.iterdir()):
        assert time.monotonic() < until, left
        time.sleep(0.02)


def server_seed(run: control.Run) -> int:
    return int(json.loads(run.plan)["seed"])


@pytest.mark.parametrize("name", AT_SERVER)
def test_the_server_is_killed_at(name: str, federation: Federation) -> None:
    """Left down: the next test starts it again, armed with the next failpoint."""
    if federation.server.process.poll() is None:
        federation.server.kill()
    count = 3 if name.startswith("event.") else 1  # the start reaches it too
    if federation.start_server(f"{name}=kill@{count}"):
        federation.await_kill(federation.server)
    assert federation.server.process.returncode == -signal.SIGKILL


@pytest.mark.parametrize("name", AT_SITE)
def test_a_site_is_killed_at(name: str, federation: Federation) -> None:
    if federation.server.process.poll() is not None:
        assert federation.start_server()
    site = federation.sites[0]
    if site.process.poll() is None:
        site.kill()
    site.environment = {VARIABLE: f"{name}=kill@2"}
    site.start()
    federation.await_kill(site)


def test_an_unknown_failpoint_is_a_clean_error(tmp_path: Path) -> None:
    with pytest.raises(ServerEnded) as ended:
        ServerProcess(tmp_path / "server", environment={VARIABLE: "spool.snyc=kill"}).start()
    assert ended.value.code == 3
    assert "'spool.snyc=kill' is not NAME=ACTION@COUNT" in ended.value.log
    assert "Traceback" not in ended.value.log
