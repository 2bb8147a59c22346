"""Abuse by members, and by whoever guesses tokens, on a real server: refused by name, and the others are served."""

import json
import re
import subprocess
import sysconfig
import threading
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from itertools import islice
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from tests.fault.guarded_server import CALLS, MIB, PATIENCE, STALL, guarded, member, witness
from tests.system.harness import CALL_SECONDS, ServerProcess, meaning_of, reason_of
from tests.system.peer import Peer, Stream, Tensors, join_all
from tests.system.runs import noop_plan, submit

from fsllm.v1 import control_pb2 as control
from fsllm.v1 import federation_pb2 as pb
from fsllm.v1.control_pb2_grpc import ControlServiceStub
from fsllm_common.tensors.chunks import CHUNK, frame_chunk

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with guarded(tmp_path_factory.mktemp("fsllm")) as server:
        yield server


@pytest.fixture
def serves(server: ServerProcess) -> Callable[[], None]:
    return witness(server)


def events(server: ServerProcess, run: str) -> list[control.WatchRunResponse]:
    return list(server.control().WatchRun(control.WatchRunRequest(run_id=run), timeout=CALL_SECONDS))


def test_hundreds_of_streams_of_one_site(server: ServerProcess, serves: Callable[[], None]) -> None:
    credential = member(server)
    channels = [
        grpc.secure_channel(
            server.address,
            grpc.ssl_channel_credentials(credential.authority, credential.key, credential.chain),
            options=[("grpc.use_local_subchannel_pool", 1), ("fsllm.number", number)],
        )
        for number in range(4)
    ]
    ended = [
        Stream(
            channel.stream_stream(
                "/fsllm.v1.FederationService/Attach",
                request_serializer=pb.AttachRequest.SerializeToString,
                response_deserializer=pb.AttachResponse.FromString,
            )
        )
        for channel in channels
        for _ in range(50)
    ]
    with ThreadPoolExecutor(len(ended)) as pool:
        futures = [pool.submit(stream.error) for stream in ended]
        # Some may wait for their Hello; all the others are refused at once, with a delay.
        first = islice(as_completed(futures), len(ended) - CALLS)
        refused = [meaning_of(future.result()) for future in first]
        serves()
        for stream in ended:
            stream.call.cancel()
    assert {error.reason for error in refused} == {"QUOTA_EXCEEDED"}
    assert {error.retry_after is not None for error in refused} == {True}
    assert any(f"{CALLS} calls in progress" in error.message for error in refused)
    for channel in channels:
        channel.close()


def test_calls_that_end_make_room(server: ServerProcess) -> None:
    """Those that are cancelled, refused, or abandoned with their connection too."""
    credential = member(server, "operator")
    run = submit(server, noop_plan("nobody"))
    watch, unknown = control.WatchRunRequest(run_id=run), control.GetRunRequest(run_id="unknown")
    for _ in range(3):
        with server.channel(credential) as channel:
            stub = ControlServiceStub(channel)
            for call in [stub.WatchRun(watch, timeout=CALL_SECONDS) for _ in range(CALLS // 4)]:
                next(call)
                call.cancel()
            for _ in range(CALLS // 4):
                with pytest.raises(grpc.RpcError) as refused:
                    stub.GetRun(unknown, timeout=CALL_SECONDS)
                assert reason_of(refused.value) == "RUN_UNKNOWN"
            left = [stub.WatchRun(watch, timeout=CALL_SECONDS) for _ in range(CALLS // 4)]
            for call in left:
                next(call)
    with server.channel(credential) as channel:
        assert ControlServiceStub(channel).GetServer(control.GetServerRequest(), timeout=CALL_SECONDS).federation
    server.control().CancelRun(control.CancelRunRequest(run_id=run), timeout=CALL_SECONDS)


def test_a_flood_of_calls(server: ServerProcess, serves: Callable[[], None]) -> None:
    """A site that attaches again and again is stopped before it has filled the log of a run."""
    credential = member(server)
    run = submit(server, noop_plan(credential.member.name))
    peer = Peer(server, credential)
    attached = 0
    with pytest.raises(grpc.RpcError) as refused:  # noqa: PT012 - any of many
        while attached < 300:
            peer.attach()
            attached += 1
    error = meaning_of(refused.value)
    assert error.reason == "QUOTA_EXCEEDED"
    assert error.retry_after is not None
    assert attached >= 100  # 1200 a minute at 10 each, and what was refilled meanwhile
    serves()
    server.control().CancelRun(control.CancelRunRequest(run_id=run), timeout=CALL_SECONDS)
    told = [event for event in events(server, run) if event.kind == "member"]
    assert len(told) <= 2 * attached + 10


@pytest.fixture
def flooding(server: ServerProcess, tmp_path: Path) -> tuple[Peer, pb.Order, Stream]:
    """A site with a TRAIN order, and its stream."""
    peer = Peer(server, member(server))
    submit(server, noop_plan(peer.name))
    order = peer.join(Tensors.make(tmp_path, 0.5, elements=100))
    assert peer.stream is not None
    return peer, order, peer.stream


def test_a_flood_of_messages(
    server: ServerProcess, serves: Callable[[], None], flooding: tuple[Peer, pb.Order, Stream], tmp_path: Path
) -> None:
    peer, order, stream = flooding
    for done in range(2000):
        stream.put(pb.AttachRequest(progress=pb.Progress(order_id=order.order_id, activity="training", done=done)))
    error = meaning_of(stream.error())
    assert (error.reason, error.retry_after) == ("QUOTA_EXCEEDED", 5.0)
    serves()
    # The order stands; what it asks for can still be delivered.
    assert not peer.deliver(order, Tensors.make(tmp_path, 1.0, elements=100)).duplicate


@pytest.mark.parametrize(
    "fields",
    [
        {"activity": "a" * 65},
        {"activity": "x" * (3 * MIB)},
        {"activity": "\x1b[31mred"},
        {"activity": "two\nlines"},
        {"order_id": "\x00"},
        {"metrics": [pb.Metric(name=f"metric-{at}") for at in range(65)]},
        {"metrics": [pb.Metric(name='loss"} 1\nfake_metric{x="')]},
        {"metrics": [pb.Metric(name="n" * 65)]},
        {"metrics": [pb.Metric(name="loss", weight=float("nan"))]},
        {"metrics": [pb.Metric(name="loss", weight=1e300)]},
    ],
)
def test_progress_that_no_daemon_would_report(flooding: tuple[Peer, pb.Order, Stream], fields: dict[str, Any]) -> None:
    _, order, stream = flooding
    stream.put(pb.AttachRequest(progress=pb.Progress(**{"order_id": order.order_id, "activity": "training", **fields})))
    assert reason_of(stream.error()) == "MESSAGE_INVALID"


def test_members_do_not_choose_prometheus_labels(
    server: ServerProcess, flooding: tuple[Peer, pb.Order, Stream]
) -> None:
    def series() -> list[str]:
        with urllib.request.urlopen(f"{server.metrics_url}/metrics", timeout=CALL_SECONDS) as page:  # noqa: S310
            return [line.rpartition(" ")[0] for line in page.read().decode().splitlines() if line[0] != "#"]

    peer, order, stream = flooding
    watch = server.control().WatchRun(control.WatchRunRequest(run_id=order.run_id), timeout=CALL_SECONDS)
    before = set(series())
    for batch in range(8):
        named = [pb.Metric(name=f"m{batch}_{at}", value=1) for at in range(60)]
        named.append(pb.Metric(name="tokens_per_second", value=float("inf")))
        stream.put(
            pb.AttachRequest(
                progress=pb.Progress(order_id=order.order_id, activity=f"made-up-{batch}", done=batch, metrics=named)
            )
        )
    assert any(event.progress.activity == "made-up-7" for event in watch)
    watch.cancel()
    new = {line for line in set(series()) - before if not line.startswith("fsllm_server_calls_total")}
    assert new == {f'fsllm_server_tokens_per_second{{member="{peer.name}",run="{order.run_id}"}}'}


EVIL = (
    'it died\n{"event": "forged", "level": "critical"}\r\x1b[2J\x1b]0;owned\x07\x9b31m\u202egnp.exe\u2028'
    " [bold]rich[/bold]"
)


@pytest.mark.parametrize("style", ["json", "human"])
def test_words_that_would_write_lines_and_drive_terminals(tmp_path: Path, style: str) -> None:
    with ServerProcess(tmp_path / "server", "--log-format", style, "--log-level", "debug") as server:
        peer = Peer(server, server.enroll("mallory"))
        run = submit(server, noop_plan("mallory"))
        peer.attach()
        peer.answer(peer.order(), declined=pb.Declined(reason="POLICY_REFUSED", message=EVIL * 100))
        line = server.await_log("declines")
        watched = server.control().WatchRun(control.WatchRunRequest(run_id=run), timeout=CALL_SECONDS)
        message = next(event.message for event in watched if "declines" in event.message)
        watched.cancel()
        commands = (("run", "show", run), ("site", "list")) if style == "human" else (("run", "show", run, "--json"),)
        shown = [
            subprocess.run(
                [f"{sysconfig.get_path('scripts')}/fsllm", *command],
                env={"PATH": "/usr/bin:/bin", "FSLLM_STATE_DIR": str(server.state), "HOME": str(tmp_path)},
                capture_output=True,
                timeout=60,
                check=False,
                text=True,
            ).stdout
            for command in commands
        ]
        log = server.log
    assert r"it died\n{" in message
    assert len(message) < 1100
    for text in (message, line.rstrip("\n"), *(part for output in shown for part in output.split("\n"))):
        assert text.isprintable(), text
    assert "[bold]rich[/bold]" in message
    lines = log.splitlines()
    assert not re.search(r"^\{\"event\": \"forged\"", log, re.MULTILINE)
    if style == "json":
        assert all(json.loads(one)["event"] != "forged" for one in lines)
    else:
        assert all(re.match(r"\S*\d\d:\d\d:\d\d", one) for one in lines if one)
    assert any("mallory" in output for output in shown)


# Join tokens.


def test_guessing_join_tokens(server: ServerProcess, serves: Callable[[], None]) -> None:
    invitation = server.invite("rightful")
    identifier, _, secret = invitation.token.partition(".")
    reasons = []
    for guess in range(60):
        invitation.token = f"{identifier}.{guess:043d}"
        with pytest.raises(grpc.RpcError) as refused:
            server.redeem(invitation)
        error = meaning_of(refused.value)
        reasons.append(error.reason)
        if error.reason == "QUOTA_EXCEEDED":
            assert error.retry_after is not None
            break
    assert set(reasons[:-1]) == {"JOIN_TOKEN_UNKNOWN"}
    assert (reasons[-1], 30 <= len(reasons) <= 45) == ("QUOTA_EXCEEDED", True)
    serves_members = server.control()
    assert serves_members.GetServer(control.GetServerRequest(), timeout=CALL_SECONDS).federation == "fsllm"
    # The token is not spent by guesses: it works when the address is looked at again.
    invitation.token = f"{identifier}.{secret}"
    threading.Event().wait(error.retry_after)
    assert server.redeem(invitation).member.name == "rightful"


# Transfers that take their time.


def test_an_upload_that_trickles_loses_its_slot_and_goes_on_where_it_stood(
    server: ServerProcess, tmp_path: Path
) -> None:
    trickler, other = sorted((Peer(server, member(server)) for _ in range(2)), key=lambda peer: peer.name)
    run = submit(server, noop_plan(trickler.name, other.name))
    zero = Tensors.make(tmp_path, 0.5, elements=10 * MIB // 4)
    delta = Tensors.make(tmp_path, 1.0, elements=10 * MIB // 4)
    order, others = join_all([trickler, other], zero)
    upload = trickler.upload()
    upload.begin(delta.begin(order))
    assert upload.ready() == 0
    # A chunk a second never stalls (that would take two), and is a quarter of the least rate.
    stop = threading.Event()

    def trickle() -> None:
        for at in range(0, len(delta.payload), CHUNK):
            upload.put(frame_chunk(at, delta.payload[at : at + CHUNK]))
            if stop.wait(1.0):
                return

    with ThreadPoolExecutor(1) as pool:
        pool.submit(trickle)
        error = meaning_of(upload.error())
        stop.set()
    assert (error.reason, error.retry_after) == ("TOO_SLOW", 1.0)
    other.deliver(others, delta)
    again = trickler.upload()
    again.begin(delta.begin(order))
    offset = again.ready()
    assert 0 < offset < len(delta.payload)
    again.send(delta.payload, offset)
    assert not again.receipt().duplicate
    told = events(server, run)
    assert told[-1].subject == "done"
    assert not [event for event in told if event.kind == "rejected"]


def test_readers_that_do_not_read(server: ServerProcess, serves: Callable[[], None], tmp_path: Path) -> None:
    """Downloads of 48 MiB that stop after the manifest: the server holds one chunk for them all, and then lets go."""
    peer = Peer(server, member(server))
    run = submit(server, noop_plan(peer.name))
    zero = Tensors.make(tmp_path, 0.5, elements=48 * MIB // 4)
    order = peer.join(zero)
    process = psutil.Process(server.process.pid)
    before = process.memory_info().rss
    fetch: Any = peer.channel.unary_stream(
        "/fsllm.v1.FederationService/Download",
        request_serializer=pb.DownloadRequest.SerializeToString,
        response_deserializer=None,
    )
    request = pb.DownloadRequest(run_id=run, digest=order.base.digest)

    calls = [fetch(request, timeout=PATIENCE)]
    next(calls[0])
    calls += [fetch(request, timeout=PATIENCE) for _ in range(CALLS - 2)]  # besides Attach
    serves()
    assert process.memory_info().rss - before < 16 * MIB
    threading.Event().wait(STALL + 0.5)
    # Whoever reads on comes to the reason.
    with pytest.raises(grpc.RpcError) as ended:
        list(calls[0])
    assert reason_of(ended.value) == "SITE_IDLE"
    for call in calls:
        call.cancel()
    assert peer.download(order.base, run) == (zero.manifest, zero.payload)
