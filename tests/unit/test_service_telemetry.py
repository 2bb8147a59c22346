"""Metric names, log lines, the web port, the settings' own rules, and what start-up gives back."""

# The only scheme here is http.
# ruff: noqa: S310

import io
import json
import logging
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog
from prometheus_client import generate_latest

from fsllm_common.errors import FsllmError
from fsllm_common.memory import _untouched_code
from fsllm_common.telemetry import logs
from fsllm_common.telemetry.metrics import ClientMetrics, ServerMetrics
from fsllm_common.telemetry.web import WebServer
from fsllm_server.settings import ServerSettings


@pytest.fixture
def reset_logging() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    structlog.reset_defaults()


@pytest.mark.parametrize("metrics", [ServerMetrics, ClientMetrics])
def test_names_are_as_prometheus_wants_them(metrics: type[ServerMetrics | ClientMetrics]) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("no promtool: Debian's package prometheus")
    page = generate_latest(metrics().registry)
    done = subprocess.run([promtool, "check", "metrics"], input=page, capture_output=True, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, b"")


def test_the_series_of_a_run_go_with_it() -> None:
    metrics = ServerMetrics()
    for run in ("r1", "r2"):
        metrics.loss.labels(run, "site").set(1)
        metrics.epsilon.labels(run, "a").set(1)
        metrics.tokens_per_second.labels(run, "a").set(1)
    metrics.forget_run("r1")
    metrics.forget_run("never-seen")
    page = generate_latest(metrics.registry).decode()
    assert "r1" not in page
    assert page.count('run="r2"') == 3


def test_json_lines_carry_what_is_bound(reset_logging: None) -> None:
    stream = io.StringIO()
    logs.configure("info", "auto", stream)
    log = logs.get_logger()
    with logs.bound(run="r", round=3, site="a"):
        log.info("trained", loss=0.5)
        log.debug("not shown")
    log.info("alone")
    logging.getLogger("other").warning("from %s", "elsewhere")
    try:
        int("why")
    except ValueError:
        log.exception("failed")
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [line["event"] for line in lines] == ["trained", "alone", "from elsewhere", "failed"]
    assert {key: lines[0][key] for key in ("run", "round", "site", "loss", "level")} == {
        "run": "r",
        "round": 3,
        "site": "a",
        "loss": 0.5,
        "level": "info",
    }
    assert "run" not in lines[1]
    assert "ValueError: invalid literal" in lines[3]["exception"]


def test_lines_for_people(reset_logging: None) -> None:
    stream = io.StringIO()
    logs.configure("info", "human", stream)
    logs.get_logger().info("trained", loss=0.5)
    assert "trained loss=0.5" in stream.getvalue()
    assert not stream.getvalue().startswith("{")


def test_the_daemons_modules_load_no_rich_no_numpy_and_no_alembic() -> None:
    program = (
        "import sys, fsllm_server.cli, fsllm_server.app; "
        "sys.exit(','.join({'rich', 'numpy', 'ml_dtypes', 'alembic', 'yaml', 'torch'} & sys.modules.keys()) or None)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_web_port_says_what_is_not_ready() -> None:
    wrong: list[str] = []
    web = WebServer("127.0.0.1", 0, ServerMetrics().registry, [lambda: wrong[0] if wrong else None, lambda: None])
    web.start()
    try:
        url = f"http://127.0.0.1:{web.port}"
        with urllib.request.urlopen(f"{url}/readyz") as answer:
            assert answer.status == 200
        wrong.append("the disk is full")
        with pytest.raises(urllib.error.HTTPError) as unready:
            urllib.request.urlopen(f"{url}/readyz")
        assert unready.value.code == 503
        assert unready.value.read() == b"the disk is full\n"
        unready.value.close()
        with pytest.raises(urllib.error.HTTPError) as posted:
            urllib.request.urlopen(f"{url}/healthz", data=b"x")
        assert posted.value.code == 405
        posted.value.close()
        with pytest.raises(FsllmError, match=str(web.port)) as taken:
            WebServer("127.0.0.1", web.port, ServerMetrics().registry, [])
        assert taken.value.reason == "PORT_IN_USE"
    finally:
        web.stop()


@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, 50052), ({"port": 0}, 0), ({"port": 65535}, 0), ({"port": 7000}, 7001), ({"enrollment_port": 9}, 9)],
)
def test_the_enrolment_port_follows_the_main_one(given: dict[str, int], expected: int) -> None:
    assert ServerSettings.model_validate(given).chosen_enrollment_port == expected


def test_the_state_folder_is_systemds_when_it_gives_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STATE_DIRECTORY", "/var/lib/fsllm-server:/var/lib/other")
    assert ServerSettings().state_dir == Path("/var/lib/fsllm-server")
    monkeypatch.delenv("STATE_DIRECTORY")
    monkeypatch.setenv("XDG_STATE_HOME", "/home/me/state")
    assert ServerSettings().state_dir == Path("/home/me/state/fsllm/server")
    monkeypatch.delenv("XDG_STATE_HOME")
    assert ServerSettings().state_dir == Path.home() / ".local/state/fsllm/server"


def test_a_server_that_listens_on_one_address_is_named_by_it() -> None:
    everywhere, one = ServerSettings(), ServerSettings(listen="10.1.2.3", host=("fed.example.org",))
    assert (everywhere.local_host, one.local_host) == ("localhost", "10.1.2.3")
    assert one.certificate_hosts[0] == one.public_host == "fed.example.org"
    assert "10.1.2.3" in one.certificate_hosts
    assert {"localhost", "127.0.0.1", "::1"} <= set(everywhere.certificate_hosts)


def test_only_code_that_is_as_its_file_is_given_back() -> None:
    smaps = """\
1000-3000 r-xp 00000000 08:01 77 /lib/clean.so
Rss:                   8 kB
Anonymous:             0 kB
3000-4000 r-xp 00000000 08:01 78 /lib/patched.so
Anonymous:             4 kB
4000-5000 r--p 00000000 08:01 77 /lib/clean.so
Anonymous:             0 kB
5000-6000 rw-p 00000000 08:01 77 /lib/clean.so
Anonymous:             0 kB
6000-7000 r-xp 00000000 00:00 0 [vdso]
Anonymous:             0 kB
"""
    assert _untouched_code(smaps) == [(0x1000, 0x3000)]
