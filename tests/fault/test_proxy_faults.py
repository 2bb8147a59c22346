"""Real daemons over a network that breaks: each run ends with the exact result, and no byte is sent for nothing."""

import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.fault.federation import MIB, Federation, counted, federation, lines, metric, window
from tests.fault.proxy import Fault, Proxy
from tests.system.harness import CALL_SECONDS
from tests.system.runs import until

from fsllm.v1 import control_pb2 as control

pytestmark = pytest.mark.slow

PAYLOAD = 6 * MIB
UPLOADS = [PAYLOAD] * (1 + 2 * 2)
"""Version 0 from one site, then two rounds of two."""


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    folder = tmp_path_factory.mktemp("fsllm")
    data = folder / "rows.jsonl"
    data.write_text('{"prompt": "a", "completion": "b"}\n')
    with federation(folder, data) as running:
        yield running


@pytest.fixture(autouse=True)
def _healthy(sites: Federation) -> Iterator[None]:
    yield
    sites.heal()


def test_a_slow_network(sites: Federation) -> None:
    sites.inflict(Fault(latency=0.03, bytes_per_second=16 * MIB))
    connections = sites.connections()
    with counted(sites) as sent:
        sites.finish(sites.submit())
    assert sites.connections() == connections  # slow is not broken
    assert sent[0].received == sum(UPLOADS)
    assert not sent[0].resumed


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(Fault(reset_after=4 * MIB, direction="up"), id="reset in an upload"),
        pytest.param(Fault(reset_after=4 * MIB, direction="down"), id="reset in a download"),
        pytest.param(Fault(truncate_after=4 * MIB, direction="up"), id="truncated"),
        pytest.param(Fault(flip_at=4 * MIB, direction="up"), id="a flipped bit in an upload"),
        pytest.param(Fault(flip_at=4 * MIB, direction="down"), id="a flipped bit in a download"),
    ],
)
def test_connections_that_break_again_and_again(sites: Federation, fault: Fault) -> None:
    """Every connection breaks after 4 MiB, so each payload of 6 MiB needs more than one."""
    connections, refused = sites.connections(), metric(sites.server, "fsllm_server_updates_rejected_total")
    sites.inflict(fault)
    with counted(sites) as sent:
        sites.finish(sites.submit())
    interruptions = sites.connections() - connections
    assert interruptions >= 4
    assert sent[0].received in window(UPLOADS, interruptions)
    if fault.direction == "up":
        assert len(sent[0].resumed) >= 2
    # A bit that flips is seen by TLS, which ends the connection: no byte of that record is ever looked at.
    assert metric(sites.server, "fsllm_server_updates_rejected_total") == refused
    assert not any(word in sites.server.log for word in ("CHUNK_CORRUPT", "DIGEST_MISMATCH"))


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(Fault(black_hole=True, swallow_after=3 * MIB), id="a black hole"),
        pytest.param(Fault(half_open=True, swallow_after=3 * MIB, direction="up"), id="the server hears nothing"),
        pytest.param(Fault(half_open=True, swallow_after=3 * MIB, direction="down"), id="the site hears nothing"),
    ],
)
def test_silence_is_noticed(sites: Federation, fault: Fault) -> None:
    """The connections of now fall silent in the middle of a payload; nobody is told, and both ends live."""
    silenced = [proxy.live for proxy in sites.proxies]
    sites.inflict_live(fault)
    with counted(sites) as sent:
        sites.finish(sites.submit())
    assert sent[0].received in window(UPLOADS, 2)
    assert not any(connection.alive for connections in silenced for connection in connections)


def test_a_network_that_swallows_everything_for_a_while(sites: Federation) -> None:
    run = sites.submit(rounds=4)
    until(sites.server, run, "commit", "1")
    before = [len(lines(site.log, "not attached; trying again")) for site in sites.sites]
    sites.inflict(Fault(black_hole=True))
    for site, times in zip(sites.sites, before, strict=True):
        site.await_log("not attached; trying again", times + 1)
    sites.heal()
    sites.finish(run, rounds=4)


def test_a_site_that_comes_back_too_late_is_told_which_round_is_over(sites: Federation) -> None:
    slow, proxy = sites.sites[0], sites.proxies[0]
    names = sorted(site.name for site in sites.sites)
    timing = {"gather_seconds": 0.01, "collect_seconds": 1.0}
    run = sites.submit(rounds=1, timing=timing, cohort={"quorum": 1, "sites": names})
    # Ready are both, and then one of them is cut off in the middle of its upload.
    until(sites.server, run, "commit", "0")
    told = slow.log.count('"reason": "ROUND_CLOSED"')
    proxy.inflict_live(Fault(black_hole=True, swallow_after=2 * MIB))
    proxy.fault = Fault(black_hole=True)  # nor do new connections help
    until(sites.server, run, "commit", "1")
    assert slow.log.count('"reason": "ROUND_CLOSED"') == told
    proxy.heal()
    # By the stream of its orders or as the answer to its upload, whichever comes through first.
    line = slow.await_log("ROUND_CLOSED", told + 1, key="reason")
    name = sites.server.control().GetRun(control.GetRunRequest(run_id=run), timeout=CALL_SECONDS).run.name
    assert {
        "order withdrawn": f"Round 1 of run {name} ({run}) is over, as is the run: done",
        "train order not done": f"Round 1 of run {name} is over",
    }[line["event"]] == line.get("why", line.get("error"))


def test_the_proxy_as_a_command() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        command = [sys.executable, str(Path(__file__).with_name("proxy.py")), "--to"]
        command += [f"127.0.0.1:{server.getsockname()[1]}", "flip_at=1", "direction=up"]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as proxy:
            assert proxy.stderr is not None
            assert proxy.stdin is not None
            host, _, port = proxy.stderr.readline().split()[0].partition(":")
            with socket.create_connection((host, int(port))) as client:
                client.sendall(b"ab")
                end, _ = server.accept()
                with end:
                    assert end.recv(2) == b"ar"
                    end.sendall(b"ab")
                    assert client.recv(2) == b"ab"
                    proxy.stdin.write("nonsense\nblack_hole\n")
                    proxy.stdin.flush()
                    assert "'nonsense' is no fault" in proxy.stderr.readline()
                    assert "black_hole=True" in proxy.stderr.readline()
            proxy.stdin.close()
            assert proxy.wait(20) == 0


def test_a_reset_is_a_reset_and_an_end_is_an_end() -> None:
    """The proxy itself: RST and FIN are different things to the ends."""
    with socket.create_server(("127.0.0.1", 0)) as server, Proxy(server.getsockname()[:2]) as proxy:
        for fault, seen in ((Fault(reset_after=2), ConnectionResetError), (Fault(truncate_after=2), None)):
            proxy.inflict(fault)
            with socket.create_connection(("127.0.0.1", proxy.port)) as client:
                client.sendall(b"abc")
                end, _ = server.accept()
                with end:
                    if seen is None:
                        assert (end.recv(9), end.recv(9)) == (b"ab", b"")
                    else:
                        with pytest.raises(seen):
                            (end.recv(9), end.recv(9))
