"""A connection of the operator's tool to a servicer that a test makes up, over real TLS."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import grpc

from fsllm.v1 import control_pb2_grpc
from fsllm_common.identity.authority import CertificateAuthority
from fsllm_common.identity.credentials import server_credentials
from fsllm_common.identity.keys import Credential, accept_chain, make_key, make_request
from fsllm_common.identity.names import Member, Role
from fsllm_operator.connection import Connection


@contextmanager
def connected(folder: Path, servicer: control_pb2_grpc.ControlServiceServicer) -> Iterator[Connection]:
    authority = CertificateAuthority.create(folder / "authority", "fed")
    serving = grpc.server(ThreadPoolExecutor(2))
    control_pb2_grpc.add_ControlServiceServicer_to_server(servicer, serving)
    own = credential(authority, ["localhost"])
    port = serving.add_secure_port("localhost:0", server_credentials(lambda: own))
    serving.start()
    with Connection(f"localhost:{port}", credential(authority)) as connection:
        yield connection
    serving.stop(None).wait()


def credential(authority: CertificateAuthority, hosts: list[str] | None = None) -> Credential:
    key = make_key()
    request = make_request(key)
    member = Member("fed", Role.OPERATOR, "op")
    chain = authority.issue_server(request, hosts) if hosts else authority.issue(request, member, timedelta(hours=1))
    return accept_chain(key, chain, authority.pem)
