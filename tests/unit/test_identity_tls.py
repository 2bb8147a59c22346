"""Real TLS on loopback: who is let in, who is not and is told why, and rotation without a restart."""

import asyncio
import ipaddress
import socket
import ssl
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509

from fsllm.v1 import federation_pb2, federation_pb2_grpc
from fsllm_common.errors import FsllmError, Unavailable
from fsllm_common.identity.authority import CertificateAuthority
from fsllm_common.identity.credentials import (
    CHANNEL_OPTIONS,
    SERVER_OPTIONS,
    Identity,
    channel_credentials,
    enrollment_channel_credentials,
    peer_identity,
    server_credentials,
)
from fsllm_common.identity.keys import Credential, accept_chain, make_key, make_request, save_credential
from fsllm_common.identity.names import Member, Role
from fsllm_common.identity.probe import why_unreachable
from fsllm_common.rpc_errors import abort, error_from

MEMBER = Member("lab", Role.SITE, "hospital-a")


def issue(authority: CertificateAuthority, member: Member = MEMBER, **lifetime: timedelta) -> Credential:
    key = make_key()
    return Credential(key, authority.issue(make_request(key), member, **lifetime), authority.pem)


def issue_server(authority: CertificateAuthority) -> Credential:
    key = make_key()
    return Credential(key, authority.issue_server(make_request(key), ["localhost", "127.0.0.1"]), authority.pem)


class Recorder(federation_pb2_grpc.FederationServiceServicer):
    """Answers Renew with the caller's identity, as the server sees it."""

    def __init__(self) -> None:
        self.seen: list[Identity] = []

    async def Renew(self, request: federation_pb2.RenewRequest, context: Any) -> federation_pb2.RenewResponse:  # noqa: ANN401, N802 (gRPC's)
        try:
            self.seen.append(peer_identity(context, "lab"))
        except FsllmError as error:
            await abort(context, error)
        return federation_pb2.RenewResponse(certificate_chain=self.seen[-1].member.uri.encode())


class Server:
    """A running server whose credential can be replaced."""

    def __init__(self, credential: Credential, *, require_client: bool = True) -> None:
        self.credential = credential
        self.recorder = Recorder()  # type: ignore[abstract]
        self.server = grpc.aio.server(options=SERVER_OPTIONS)
        federation_pb2_grpc.add_FederationServiceServicer_to_server(self.recorder, self.server)
        secure = server_credentials(lambda: self.credential, require_client=require_client)
        self.port = self.server.add_secure_port("127.0.0.1:0", secure)

    async def call(self, credentials: grpc.ChannelCredentials) -> bytes:
        async with grpc.aio.secure_channel(f"localhost:{self.port}", credentials, CHANNEL_OPTIONS) as channel:
            stub = federation_pb2_grpc.FederationServiceStub(channel)
            answer = await stub.Renew(federation_pb2.RenewRequest(), timeout=10)
            return answer.certificate_chain


@pytest.fixture
def authority(tmp_path: Path) -> CertificateAuthority:
    return CertificateAuthority.create(tmp_path / "ca", "lab")


@pytest.fixture
def stranger(tmp_path: Path) -> CertificateAuthority:
    return CertificateAuthority.create(tmp_path / "other-ca", "lab")


@pytest.fixture
async def server(authority: CertificateAuthority) -> AsyncIterator[Server]:
    running = Server(issue_server(authority))
    await running.server.start()
    yield running
    await running.server.stop(None)


async def test_the_right_certificate_is_let_in_and_names_its_member(
    server: Server, authority: CertificateAuthority
) -> None:
    mine = issue(authority)
    assert await server.call(channel_credentials(mine)) == b"spiffe://lab/site/hospital-a"
    (identity,) = server.recorder.seen
    assert (identity.name, identity.role, identity.federation) == ("hospital-a", Role.SITE, "lab")
    assert identity.serial == mine.certificate.serial_hex
    assert identity.not_after == mine.certificate.not_after
    assert identity.key_exchange_group == "X25519MLKEM768"


async def test_another_authoritys_certificate_never_reaches_the_servicer(
    server: Server, authority: CertificateAuthority, stranger: CertificateAuthority
) -> None:
    forged = issue(stranger)
    pretender = Credential(forged.key, forged.chain, authority.pem)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await server.call(channel_credentials(pretender))
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert server.recorder.seen == []


async def test_an_expired_certificate_never_reaches_the_servicer(
    server: Server, authority: CertificateAuthority
) -> None:
    expired = issue(authority, lifetime=timedelta(seconds=-1))
    with pytest.raises(grpc.aio.AioRpcError):
        await server.call(channel_credentials(expired))
    assert server.recorder.seen == []


async def test_no_certificate_never_reaches_the_servicer(server: Server, authority: CertificateAuthority) -> None:
    with pytest.raises(grpc.aio.AioRpcError):
        await server.call(enrollment_channel_credentials(authority.pem))
    assert server.recorder.seen == []


async def test_a_server_certificate_is_not_a_clients(server: Server, authority: CertificateAuthority) -> None:
    with pytest.raises(grpc.aio.AioRpcError):
        await server.call(channel_credentials(issue_server(authority)))
    assert server.recorder.seen == []


async def test_a_client_does_not_talk_to_another_federations_server(
    server: Server, stranger: CertificateAuthority
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await server.call(channel_credentials(issue(stranger)))
    assert error_from(caught.value).reason == "SERVER_UNREACHABLE"
    assert server.recorder.seen == []


async def test_a_member_of_another_federation_under_the_same_authority_is_refused(
    server: Server, authority: CertificateAuthority
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await server.call(channel_credentials(issue(authority, Member("elsewhere", Role.SITE, "hospital-a"))))
    error = error_from(caught.value)
    assert error.reason == "CERTIFICATE_UNTRUSTED"
    assert "elsewhere" in error.message


async def test_without_a_demand_for_certificates_there_is_no_identity(authority: CertificateAuthority) -> None:
    running = Server(issue_server(authority), require_client=False)
    await running.server.start()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await running.call(enrollment_channel_credentials(authority.pem))
    assert error_from(caught.value).reason == "IDENTITY_MISSING"
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
    await running.server.stop(None)


async def test_the_servers_certificate_is_replaced_without_a_restart(
    server: Server, authority: CertificateAuthority
) -> None:
    async def serial() -> int:
        pem = await asyncio.to_thread(server_certificate, server.port, authority)
        return x509.load_der_x509_certificate(pem).serial_number

    def server_certificate(port: int, authority: CertificateAuthority) -> bytes:
        context = ssl.create_default_context(cadata=authority.pem.decode())
        context.set_alpn_protocols(["h2"])
        with (
            socket.create_connection(("127.0.0.1", port), 5) as plain,
            context.wrap_socket(plain, server_hostname="localhost") as secure,
        ):
            der = secure.getpeercert(binary_form=True)
        assert der is not None
        return der

    credentials = channel_credentials(issue(authority))
    async with grpc.aio.secure_channel(f"localhost:{server.port}", credentials, CHANNEL_OPTIONS) as channel:
        stub = federation_pb2_grpc.FederationServiceStub(channel)
        await stub.Renew(federation_pb2.RenewRequest(), timeout=10)
        first = server.credential
        assert await serial() == first.certificate.serial
        server.credential = issue_server(authority)
        assert await serial() == server.credential.certificate.serial != first.certificate.serial
        # The old connection lives on.
        await stub.Renew(federation_pb2.RenewRequest(), timeout=10)


async def test_the_probe_names_the_cause(
    server: Server, authority: CertificateAuthority, stranger: CertificateAuthority, tmp_path: Path
) -> None:
    async def probe(credential: Credential, host: str = "localhost", port: int | None = None) -> FsllmError | None:
        save_credential(tmp_path / "site", credential)
        return await asyncio.to_thread(why_unreachable, f"{host}:{port or server.port}", tmp_path / "site")

    assert await probe(issue(authority)) is None

    expired = await probe(issue(authority, lifetime=timedelta(seconds=-1)))
    assert expired is not None
    assert expired.reason == "CERTIFICATE_EXPIRED"

    other = await probe(issue(stranger))
    assert other is not None
    assert other.reason == "CERTIFICATE_UNTRUSTED"
    assert "is not from this federation's CA" in other.message

    # The server trusts a new authority since; ours still trusts it, but it no longer trusts us.
    server.credential = Credential(server.credential.key, server.credential.chain, stranger.pem)
    refused = await probe(issue(authority))
    assert refused is not None
    assert refused.reason == "CERTIFICATE_UNTRUSTED"
    assert "our certificate" in refused.message

    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        nobody = await probe(issue(authority), port=unused.getsockname()[1])
    assert isinstance(nobody, Unavailable)
    assert "Nothing listens" in nobody.message


async def test_the_probe_names_a_wrong_host_name(authority: CertificateAuthority, tmp_path: Path) -> None:
    key = make_key()
    running = Server(Credential(key, authority.issue_server(make_request(key), ["elsewhere.example"]), authority.pem))
    await running.server.start()
    save_credential(tmp_path, issue(authority))
    error = await asyncio.to_thread(why_unreachable, f"localhost:{running.port}", tmp_path)
    assert error is not None
    assert "does not name 'localhost'" in error.message
    await running.server.stop(None)


def test_certificates_pass_the_strict_verifier_of_cryptography(authority: CertificateAuthority) -> None:
    store = x509.verification.Store([authority.certificate])
    builder = x509.verification.PolicyBuilder().store(store).time(datetime.now(UTC))
    leaf, root = x509.load_pem_x509_certificates(issue(authority).chain)
    verified = builder.build_client_verifier().verify(leaf, [root])
    assert verified.subjects is not None
    assert [name.value for name in verified.subjects] == [MEMBER.uri]
    assert verified.chain[-1] == authority.certificate

    server_leaf, root = x509.load_pem_x509_certificates(issue_server(authority).chain)
    builder.build_server_verifier(x509.DNSName("localhost")).verify(server_leaf, [root])
    builder.build_server_verifier(x509.IPAddress(ipaddress.ip_address("127.0.0.1"))).verify(server_leaf, [root])
    with pytest.raises(x509.verification.VerificationError):
        builder.build_server_verifier(x509.DNSName("elsewhere")).verify(server_leaf, [root])
    with pytest.raises(x509.verification.VerificationError):
        builder.build_client_verifier().verify(server_leaf, [root])


def test_a_chain_of_another_authority_or_for_another_key_is_not_accepted(
    authority: CertificateAuthority, stranger: CertificateAuthority
) -> None:
    key = make_key()
    chain = authority.issue(make_request(key), MEMBER)
    assert accept_chain(key, chain, authority.pem).member == MEMBER
    for wrong_key, wrong_authority in ((make_key(), authority.pem), (key, stranger.pem)):
        with pytest.raises(FsllmError) as caught:
            accept_chain(wrong_key, chain, wrong_authority)
        assert caught.value.reason == "CERTIFICATE_UNTRUSTED"
