"""How a site gets its certificate and keeps it: redeem a join file once, then renew at two thirds of its life."""

import asyncio
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import grpc

from fsllm.v1.enrollment_pb2 import RedeemRequest
from fsllm.v1.enrollment_pb2_grpc import EnrollmentServiceStub
from fsllm.v1.federation_pb2 import RenewRequest
from fsllm_client.link.backoff import Backoff
from fsllm_client.link.channel import Link
from fsllm_common.errors import FsllmError, JoinFileInvalid
from fsllm_common.files import write_atomic
from fsllm_common.identity.credentials import CHANNEL_OPTIONS, enrollment_channel_credentials
from fsllm_common.identity.join import JoinFile, read_join_file, token_identifier
from fsllm_common.identity.keys import (
    Credential,
    accept_chain,
    check_credential,
    load_credential,
    make_key,
    make_request,
    save_credential,
)
from fsllm_common.identity.names import Role
from fsllm_common.identity.probe import knock
from fsllm_common.rpc_errors import error_from
from fsllm_common.telemetry.logs import get_logger
from fsllm_common.telemetry.metrics import ClientMetrics

log = get_logger()

REDEEM_SECONDS: Final = 20.0
_LONGEST_SLEEP: Final = 600.0
"""Seconds. A host that was suspended finds out so soon that a renewal is due."""

_LEAST_SLEEP: Final = 60.0
"""Seconds between two renewals, or a third of a life that is shorter than three minutes."""

_JOINED: Final = "joined.json"
_PENDING: Final = "pending.{}.key"


async def credential_for(folder: Path, server: str, join_file: Path | None) -> Credential:
    """Return this member's credential, checked; get the first one with the join file.

    A join file that has been used already, or can not be used, is no obstacle to a member that is enrolled.

    Raises:
        FsllmError: NOT_ENROLLED: neither credential nor join file. CERTIFICATE_EXPIRED, CERTIFICATE_UNTRUSTED. When
            enrolling fails: JOIN_FILE_INVALID, JOIN_TOKEN_*, SERVER_UNREACHABLE.

    """
    try:
        credential = load_credential(folder)
        check_credential(credential)
    except FsllmError as error:
        if join_file is None or error.reason not in ("NOT_ENROLLED", "CERTIFICATE_EXPIRED", "CERTIFICATE_UNTRUSTED"):
            raise
        return await enroll(folder, server, read_join_file(join_file))
    if join_file is None:
        return credential
    name = credential.member.name
    try:
        join = read_join_file(join_file)
        if token_identifier(join.token) != _joined_with(folder):
            return await enroll(folder, server, join)
    except FsllmError as error:
        log.warning("already enrolled: the join file is passed over", site=name, why=error.message)
    else:
        log.info("already enrolled: the join file is spent and may be deleted", site=name, file=str(join_file))
    return credential


async def enroll(folder: Path, server: str, join: JoinFile) -> Credential:
    """Redeem a join file: a key is made here and stays here, the certificate comes back.

    The key is on disk before the token is spent: when the answer is lost, the same key redeems the same token again.

    Raises:
        JoinFileInvalid: It is an operator's, or says another name than the server knows its token by.
        FsllmError: JOIN_TOKEN_*: the server refuses. SERVER_UNREACHABLE, CERTIFICATE_UNTRUSTED.

    """
    if join.role is Role.OPERATOR:  # before the token is spent
        raise JoinFileInvalid(
            f"This join file is for the operator {join.name!r}, not for a site or evaluator",
            cure="Give it to that operator: fsllm login --join FILE. A site's is made by `fsllm site invite NAME`.",
        )
    token = token_identifier(join.token)
    pending = folder / _PENDING.format(token)
    try:
        key = pending.read_bytes()
    except FileNotFoundError:
        key = make_key()
        write_atomic(pending, key, mode=0o600)
    authority = join.ca_certificate.encode()
    # The host that the site says, because the server may not know the name by which it is reached from here.
    address = f"{server.rpartition(':')[0]}:{join.enrollment_port}"
    async with grpc.aio.secure_channel(
        address, enrollment_channel_credentials(authority), options=CHANNEL_OPTIONS
    ) as channel:
        try:
            answer = await EnrollmentServiceStub(channel).Redeem(
                RedeemRequest(token=join.token, csr=make_request(key)), timeout=REDEEM_SECONDS
            )
        except grpc.aio.AioRpcError as error:
            known = error_from(error, address)
            if known.reason == "SERVER_UNREACHABLE":
                await asyncio.to_thread(knock, address, authority)  # raises the real cause, if it finds one
            raise known from error
    credential = accept_chain(key, answer.certificate_chain, authority)
    member = credential.member
    if (member.federation, member.role, member.name) != (join.federation, join.role, join.name):
        raise JoinFileInvalid(
            f"The join file has been changed: it says {join.role} {join.name}, but its token is for {member.uri}",
            cure="Use the join file as the operator made it; a name can not be chosen at the site.",
        )
    save_credential(folder, credential)
    note = {"token": token, "federation": join.federation, "at": datetime.now(UTC).isoformat(timespec="seconds")}
    write_atomic(folder / _JOINED, json.dumps(note).encode(), mode=0o600)
    pending.unlink()
    log.info(
        "enrolled; the join file is spent and may be deleted",
        site=member.name,
        role=str(member.role),
        federation=member.federation,
        certificate_until=f"{credential.certificate.not_after:%Y-%m-%d %H:%M} UTC",
    )
    return credential


async def keep_renewed(link: Link, folder: Path, metrics: ClientMetrics) -> None:
    """Renew the certificate whenever two thirds of its life are over, until cancelled.

    Raises:
        FsllmError: CERTIFICATE_EXPIRED: no renewal succeeded in time. MEMBER_REVOKED.

    """
    backoff = Backoff(first=1.0, longest=60.0)
    while True:
        certificate = link.credential.certificate
        metrics.certificate_expiry.labels("member").set(certificate.not_after.timestamp())
        left = (certificate.renew_at - datetime.now(UTC)).total_seconds()
        if left > 0:
            await asyncio.sleep(min(left, _LONGEST_SLEEP))
            continue
        try:
            await renew(link, folder)
        except FsllmError as error:
            if error.reason in ("MEMBER_REVOKED", "CERTIFICATE_EXPIRED"):
                raise
            check_credential(link.credential)
            wait = backoff.wait(error.retry_after)
            until = f"{certificate.not_after:%Y-%m-%d %H:%M} UTC"
            log.warning(
                "the certificate could not be renewed yet", reason=error.reason, error=error.message, until=until
            )
            await asyncio.sleep(wait)
        else:
            backoff.reset()
            # A very short life, counted from its backdated beginning, is due for renewal when it begins.
            left = (link.credential.certificate.not_after - datetime.now(UTC)).total_seconds()
            await asyncio.sleep(min(_LEAST_SLEEP, left / 3))


async def renew(link: Link, folder: Path) -> None:
    """Get a certificate for a new key, store it, and move the link to it.

    Raises:
        FsllmError: The server refuses, or is not there.

    """
    old = link.credential
    key = make_key()
    try:
        answer = await link.stub.Renew(RenewRequest(csr=make_request(key)), timeout=REDEEM_SECONDS)
    except grpc.aio.AioRpcError as error:
        raise error_from(error, link.server) from error
    credential = accept_chain(key, answer.certificate_chain, old.authority)
    if credential.certificate.uri != old.certificate.uri:
        raise FsllmError(
            "CERTIFICATE_UNTRUSTED", f"The server renewed {old.certificate.uri} as {credential.certificate.uri}"
        )
    save_credential(folder, credential)
    link.replace(credential)
    log.info("certificate renewed", until=f"{credential.certificate.not_after:%Y-%m-%d %H:%M} UTC")


def _joined_with(folder: Path) -> str | None:
    """Return the identifier of the token that this member enrolled with."""
    try:
        note = json.loads((folder / _JOINED).read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    return note.get("token") if isinstance(note, dict) else None
