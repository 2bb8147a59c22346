"""Becoming an operator on another host: a join file is redeemed for a certificate whose key is made here."""

import json
from pathlib import Path

import grpc

from fsllm.v1.enrollment_pb2 import RedeemRequest
from fsllm.v1.enrollment_pb2_grpc import EnrollmentServiceStub
from fsllm_common.errors import JoinFileInvalid
from fsllm_common.files import write_atomic
from fsllm_common.identity.credentials import CHANNEL_OPTIONS, enrollment_channel_credentials
from fsllm_common.identity.join import JoinFile
from fsllm_common.identity.keys import Credential, accept_chain, make_key, make_request, save_credential
from fsllm_common.identity.names import Role
from fsllm_operator.connection import CALL_SECONDS, explain
from fsllm_operator.credentials import SERVER_FILE

_PENDING = "pending-key.pem"


def enroll(join: JoinFile, folder: Path, host: str | None = None) -> Credential:
    """Redeem an operator's join file and keep credential and server address in ``folder``.

    The key is kept before the token is spent: when the answer is lost, the same command gets the same certificate.

    Raises:
        JoinFileInvalid: It is a site's or an evaluator's.
        FsllmError: JOIN_TOKEN_USED and the like, or the server can not be reached.

    """
    if join.role is not Role.OPERATOR:
        raise JoinFileInvalid(
            f"This join file is for the {join.role} {join.name!r}, not for an operator",
            cure="Give it to that member's daemon: fsllm-client --join FILE. "
            "An operator's is made by `fsllm operator invite NAME -o FILE`.",
        )
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    key = _pending_key(folder)
    authority = join.ca_certificate.encode()
    server = f"{host or join.host}:{join.enrollment_port}"
    with grpc.secure_channel(server, enrollment_channel_credentials(authority), CHANNEL_OPTIONS) as channel:
        try:
            answer = EnrollmentServiceStub(channel).Redeem(
                RedeemRequest(token=join.token, csr=make_request(key)), timeout=CALL_SECONDS
            )
        except grpc.RpcError as error:
            raise explain(error, server) from error
    credential = accept_chain(key, answer.certificate_chain, authority)
    save_credential(folder, credential)
    address = {"server": f"{host or join.host}:{join.port}", "federation": join.federation}
    write_atomic(folder / SERVER_FILE, json.dumps(address, indent=2).encode() + b"\n")
    (folder / _PENDING).unlink()
    return credential


def _pending_key(folder: Path) -> bytes:
    path = folder / _PENDING
    if not path.exists():
        write_atomic(path, make_key(), mode=0o600)
    return path.read_bytes()
