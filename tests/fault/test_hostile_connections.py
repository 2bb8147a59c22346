"""Connections that say nothing, nonsense, or are thousands, on a real server: they are cut off, the others served."""

import socket
import ssl
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import psutil
import pytest
from tests.fault.guarded_server import CONNECTIONS, PATIENCE, guarded, member, witness
from tests.system.harness import ServerProcess

from fsllm_common.identity.keys import Credential

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with guarded(tmp_path_factory.mktemp("fsllm")) as server:
        yield server


@pytest.fixture
def serves(server: ServerProcess) -> Callable[[], None]:
    return witness(server)


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
