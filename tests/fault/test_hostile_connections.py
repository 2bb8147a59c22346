"""Abuse of connections, streams and words, on a real server: it is cut off by name, and the others are served."""

import json
import re
import socket
import ssl
import subprocess
import sysconfig
import threading
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any
from uuid import uuid4

import grpc
import numpy as np
import psutil
import pytest
from tests.system.harness import CALL_SECONDS, ServerProcess, meaning_of, reason_of
from tests.system.peer import Peer, Stream, Tensors, join_all
from tests.system.runs import noop_plan, submit

from fsllm.v1 import control_pb2 as control
from fsllm.v1 import federation_pb2 as pb
from fsllm.v1.control_pb2_grpc import ControlServiceStub
from fsllm_common.identity.keys import Credential
from fsllm_common.tensors.chunks import CHUNK, frame_chunk

pytestmark = pytest.mark.slow

MIB = 1 << 20
CONNECTIONS = 2100
CALLS = 40
STALL = 2.0
PATIENCE = 40.0
"""Seconds until a socket that the server should close fails the test."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with ServerProcess(
        tmp_path_factory.mktemp("fsllm") / "server",
        *("--max-connections", str(CONNECTIONS), "--calls-per-member", str(CALLS), "--calls-per-minute", "1200"),
        *("--upload-stall-seconds", str(STALL), "--transfer-least-rate", str(4 * MIB)),
        *("--messages-per-second", "20", "--join-attempts-per-minute", "30", "--uploads-at-once", "2"),
    ) as server:
        yield server


@pytest.fixture
def serves(server: ServerProcess) -> Callable[[], None]:
    """Check that somebody else is served, on a connection there was before and on a new one."""
    credential = server.enroll(f"witness-{uuid4().hex[:8]}", "operator")
    stub = server.control(credential)
    ask = control.GetServerRequest()
    stub.GetServer(ask, timeout=CALL_SECONDS)

    def check() -> None:
        assert stub.GetServer(ask, timeout=CALL_SECONDS).federation == "fsllm"
        with server.channel(credential) as channel:
            assert ControlServiceStub(channel).GetServer(ask, timeout=CALL_SECONDS).federation == "fsllm"

    return check


def member(server: ServerProcess, role: str = "site") -> Credential:
    return server.enroll(f"{role}-{uuid4().hex[:8]}", role)


def events(server: ServerProcess, run: str) -> list[control.WatchRunResponse]:
    return list(server.control().WatchRun(control.WatchRunRequest(run_id=run), timeout=CALL_SECONDS))


# Connections.


def ports(server: ServerProcess) -> tuple[int, int]:
    return server.port, int(server.told["enrollment_port"])


def tls(server: ServerProcess, credential: Credential | None, folder: Path) -> ssl.SSLContext:
    context = ssl.create_default_context(cadata=server.operator().authority.decode())
    context.set_alpn_protocols(["h2"])
    if credential is not None:
        path = folder / "credential.pem"
        path.write_bytes(credential.key + credential.chain)
        context.load_cert_chain(path)
    return context


def connect(port: int, context: ssl.SSLContext) -> ssl.SSLSocket:
    return context.wrap_socket(socket.create_connection(("127.0.0.1", port), PATIENCE), server_hostname="localhost")


def until_closed(connection: socket.socket) -> None:
    """Read until the server has closed the connection."""
    connection.settimeout(PATIENCE)
    try:
        while connection.recv(65536):
            pass
    except (ConnectionError, ssl.SSLError):
        pass


def hello_bytes() -> bytes:
    """Return the first flight of a TLS handshake."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    wrapped = ssl.create_default_context().wrap_bio(incoming, outgoing, server_hostname="localhost")
    with pytest.raises(ssl.SSLWantReadError):
        wrapped.do_handshake()
    return outgoing.read()


PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
SETTINGS = bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))


def test_connections_that_never_say_who_they_are(
    server: ServerProcess, serves: Callable[[], None], tmp_path: Path
) -> None:
    """Silence, half a handshake, a whole one and then nothing, and a caller that never calls: each is closed."""
    opening = hello_bytes()
    credential = member(server)
    with ExitStack() as stack:
        waiting: list[socket.socket] = []
        for port in ports(server):
            for sent in (b"", opening[:1], opening[: len(opening) // 2], opening):
                for _ in range(10):
                    plain = stack.enter_context(socket.create_connection(("127.0.0.1", port), PATIENCE))
                    plain.sendall(sent)
                    waiting.append(plain)
            mine = credential if port == server.port else None
            waiting.append(stack.enter_context(connect(port, tls(server, mine, tmp_path))))
        # HTTP/2 is spoken, but nothing asked for: the enrolment port closes it after 10 seconds.
        idle = stack.enter_context(connect(ports(server)[1], tls(server, None, tmp_path)))
        idle.sendall(PREFACE + SETTINGS)
        waiting.append(idle)
        serves()
        with ThreadPoolExecutor(len(waiting)) as pool:
            list(pool.map(until_closed, waiting))
        serves()


@pytest.mark.parametrize("port_of", [0, 1])
def test_bytes_that_are_no_http2(
    server: ServerProcess, serves: Callable[[], None], tmp_path: Path, port_of: int
) -> None:
    context = tls(server, None if port_of else member(server), tmp_path)
    port = ports(server)[port_of]
    generator = np.random.Generator(np.random.PCG64(7))
    frame = SETTINGS[:3]
    for sent in (
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"PRI * HTTP/9.9\r\n\r\n",
        generator.bytes(100_000),
        PREFACE + generator.bytes(100_000),
        PREFACE + b"\xff\xff\xff\x00\x00\x00\x00\x00\x01" + bytes(100_000),  # 16 MiB of data for no stream
        PREFACE + SETTINGS + b"\x00\x40\x01\x01\x04\x00\x00\x00\x01" + generator.bytes(0x4001),  # broken headers
        PREFACE + SETTINGS + b"\x00\x00\x08\x06\x00\x00\x00\x00\x00" * 1000 + bytes(8000),  # pings without bytes
        PREFACE + SETTINGS * 10_000,
        PREFACE + SETTINGS + (frame + b"\x09\x00\x00\x00\x00\x01") * 10_000,  # continuations of nothing
    ):
        with connect(port, context) as connection:
            try:
                connection.sendall(sent)
                connection.shutdown(socket.SHUT_WR)
            except OSError:
                pass  # the server has closed it in the midst
            until_closed(connection)
    serves()
    assert server.process.poll() is None


def test_thousands_of_idle_connections(server: ServerProcess, serves: Callable[[], None], tmp_path: Path) -> None:
    """2,000 of one site on the main port: each costs little, those beyond the limit are closed at once."""
    context = tls(server, member(server), tmp_path)
    process = psutil.Process(server.process.pid)
    before = process.memory_info().rss
    with ExitStack() as stack:
        for count in range(1, 2001):
            connection = stack.enter_context(connect(server.port, context))
            connection.sendall(PREFACE + SETTINGS)
            if count % 500 == 0:
                serves()
        assert process.memory_info().rss - before < 2000 * 160 * 1024
        more = []
        for _ in range(CONNECTIONS - 2000 + 100):
            try:
                more.append(stack.enter_context(connect(server.port, context)))
            except (ssl.SSLError, ConnectionError):
                break
        else:
            pytest.fail("the server took more connections than --max-connections allows")
        for connection in more:
            connection.close()
    serves()


# Streams and messages.


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
