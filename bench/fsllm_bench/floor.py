"""The floor under a round: a bare gRPC mTLS transfer of the same bytes, which keeps nothing and computes nothing.

A server process and as many client processes as there are sites, on loopback, with certificates as the federation
issues them. In a round each client receives the payload and then sends as much back, in chunks of the same size that
gRPC passes through untouched: no disk, no checksum, no digest, no sum, no order to wait for.
"""

import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any, Final

import grpc

from fsllm_common.identity.authority import CertificateAuthority
from fsllm_common.identity.credentials import CHANNEL_OPTIONS, SERVER_OPTIONS, channel_credentials, server_credentials
from fsllm_common.identity.keys import Credential, make_key, make_request
from fsllm_common.identity.names import Member
from fsllm_common.tensors.chunks import CHUNK

_SERVICE: Final = "fsllm.bench.Floor"
_PATIENCE: Final = 300.0
"""Seconds for one round, at most."""


def floor(sites: int, mebibytes: float, rounds: int) -> float:
    """Return the median seconds of a round."""
    context = multiprocessing.get_context("spawn")
    size = round(mebibytes * 2**20)
    turn = context.Barrier(sites + 1)
    with tempfile.TemporaryDirectory(prefix="fsllm-floor-") as folder, ExitStack() as stack:
        authority = CertificateAuthority.create(Path(folder), "bench")
        ours, theirs = context.Pipe()
        processes = [context.Process(target=_serve, args=(_server(authority), size, sites, theirs), daemon=True)]
        processes[0].start()
        stack.callback(_end, processes)
        port: int = ours.recv()
        for number in range(sites):
            credential = _member(authority, f"site-{number}")
            client = context.Process(target=_take_part, args=(credential, port, size, rounds + 1, turn), daemon=True)
            client.start()
            processes.append(client)
        turn.wait(_PATIENCE)  # all are connected
        seconds = []
        for _ in range(rounds + 1):
            turn.wait(_PATIENCE)
            began = time.monotonic()
            turn.wait(_PATIENCE)
            seconds.append(time.monotonic() - began)
    return statistics.median(seconds[1:])


def _end(processes: list[Any]) -> None:
    for process in processes:
        process.terminate()
    for process in processes:
        process.join()


def _server(authority: CertificateAuthority) -> Credential:
    key = make_key()
    return Credential(key, authority.issue_server(make_request(key), ["localhost"]), authority.pem)


def _member(authority: CertificateAuthority, name: str) -> Credential:
    key = make_key()
    return Credential(key, authority.issue(make_request(key), Member.of("bench", "site", name)), authority.pem)


def _chunks(size: int) -> Iterator[bytes]:
    whole = bytes(CHUNK)
    for offset in range(0, size, CHUNK):
        yield whole[: size - offset]


def _serve(credential: Credential, size: int, clients: int, port: Connection) -> None:
    def download(request: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
        return _chunks(size)

    def upload(requests: Iterator[bytes], context: grpc.ServicerContext) -> bytes:
        return str(sum(map(len, requests))).encode()

    server = grpc.server(ThreadPoolExecutor(clients), options=SERVER_OPTIONS)
    handlers: dict[str, Any] = {
        "Download": grpc.unary_stream_rpc_method_handler(download),
        "Upload": grpc.stream_unary_rpc_method_handler(upload),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(_SERVICE, handlers),))
    port.send(server.add_secure_port("localhost:0", server_credentials(lambda: credential)))
    server.start()
    server.wait_for_termination()


def _take_part(credential: Credential, port: int, size: int, rounds: int, turn: Barrier) -> None:
    channel = grpc.secure_channel(f"localhost:{port}", channel_credentials(credential), options=CHANNEL_OPTIONS)
    download: Any = channel.unary_stream(f"/{_SERVICE}/Download")
    upload: Any = channel.stream_unary(f"/{_SERVICE}/Upload")
    grpc.channel_ready_future(channel).result(_PATIENCE)
    turn.wait(_PATIENCE)
    for _ in range(rounds):
        turn.wait(_PATIENCE)
        received = sum(map(len, download(b"", timeout=_PATIENCE)))
        sent = int(upload(_chunks(size), timeout=_PATIENCE))
        if not received == sent == size:
            raise ValueError(f"{received} bytes received and {sent} sent of {size}")
        turn.wait(_PATIENCE)
