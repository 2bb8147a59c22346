"""Who gets in, who does what, and who is put out: certificates, join tokens, roles, revocation."""

import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from tests.system.harness import CALL_SECONDS, ServerProcess, reason_of
from tests.system.peer import Peer, Stream

from fsllm.v1 import control_pb2 as control
from fsllm.v1 import federation_pb2 as pb
from fsllm.v1.enrollment_pb2 import RedeemRequest
from fsllm.v1.enrollment_pb2_grpc import EnrollmentServiceStub
from fsllm.v1.federation_pb2_grpc import FederationServiceStub
from fsllm_common.identity.authority import CertificateAuthority
from fsllm_common.identity.credentials import enrollment_channel_credentials
from fsllm_common.identity.keys import Credential, accept_chain, make_key, make_request
from fsllm_common.identity.names import Member, Role
from fsllm_server.service.guard import ROLES

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with ServerProcess(tmp_path_factory.mktemp("fsllm") / "server") as server:
        yield server


def forge(
    server: ServerProcess, uri: Member, folder: Path | None = None, life: timedelta = timedelta(hours=1)
) -> Credential:
    """Sign a certificate beside the server: with its own authority's key, or with a new authority in ``folder``."""
    own = CertificateAuthority.load(server.state / "authority")
    authority = CertificateAuthority.create(folder, "fsllm") if folder else own
    key = make_key()
    return Credential(key, authority.issue(make_request(key), uri, life), own.pem)


def refused(call: Callable[[], object]) -> str:
    with pytest.raises(grpc.RpcError) as error:
        call()
    return reason_of(error.value)


def status_call(server: ServerProcess, credential: Credential) -> Callable[[], object]:
    stub = FederationServiceStub(server.channel(credential))
    return lambda: stub.UploadStatus(pb.UploadStatusRequest(run_id="none", round=1), timeout=CALL_SECONDS)


# Certificates.


def test_strangers_do_not_get_past_tls(server: ServerProcess, tmp_path: Path) -> None:
    site = Member("fsllm", Role.SITE, "a")
    authority = server.operator().authority
    without = FederationServiceStub(grpc.secure_channel(server.address, enrollment_channel_credentials(authority)))
    assert refused(lambda: without.Renew(pb.RenewRequest(), timeout=CALL_SECONDS)) == "SERVER_UNREACHABLE"
    other = forge(server, site, tmp_path)
    assert refused(status_call(server, other)) == "SERVER_UNREACHABLE"
    expired = forge(server, site, life=timedelta(seconds=-1))
    assert refused(status_call(server, expired)) == "SERVER_UNREACHABLE"


@pytest.mark.parametrize(
    ("member", "reason"),
    [
        (Member("fsllm", Role.SITE, "nobody-invited"), "NOT_ENROLLED"),
        (Member("elsewhere", Role.SITE, "nobody-invited"), "CERTIFICATE_UNTRUSTED"),
    ],
)
def test_a_certificate_alone_is_not_enough(server: ServerProcess, member: Member, reason: str) -> None:
    assert refused(status_call(server, forge(server, member))) == reason


def test_a_role_that_the_record_does_not_give(server: ServerProcess) -> None:
    name = server.enroll("plain-site").member.name
    assert refused(status_call(server, forge(server, Member("fsllm", Role.OPERATOR, name)))) == "NOT_ENROLLED"


def test_a_live_stream_ends_with_its_certificate(server: ServerProcess) -> None:
    member = server.enroll("short-lived").member
    stream = Peer(server, forge(server, member, life=timedelta(seconds=2))).attach()
    assert reason_of(stream.error()) == "CERTIFICATE_EXPIRED"


def test_renewal_gives_the_same_identity_for_a_new_key(server: ServerProcess) -> None:
    before = server.enroll("renewing")
    key = make_key()
    stub = FederationServiceStub(server.channel(before))
    chain = stub.Renew(pb.RenewRequest(csr=make_request(key)), timeout=CALL_SECONDS).certificate_chain
    after = accept_chain(key, chain, before.authority)
    assert after.member == before.member
    assert after.certificate.serial != before.certificate.serial
    for credential in (before, after):
        assert status_call(server, credential)()
    assert refused(lambda: stub.Renew(pb.RenewRequest(csr=b"none"), timeout=CALL_SECONDS)) == "CSR_INVALID"


# Join tokens.


def test_a_token_works_once_and_again_only_for_its_key(server: ServerProcess) -> None:
    invitation = server.invite("once")
    key = make_key()
    first = server.redeem(invitation, key)
    assert server.redeem(invitation, key).chain == first.chain
    assert refused(lambda: server.redeem(invitation)) == "JOIN_TOKEN_USED"
    assert refused(lambda: server.invite("once")) == "MEMBER_EXISTS"


def test_a_token_that_is_late_or_wrong_or_replaced(server: ServerProcess) -> None:
    late = server.invite("late", valid_seconds=1)
    threading.Event().wait(1.1)  # the token's own life
    assert refused(lambda: server.redeem(late)) == "JOIN_TOKEN_EXPIRED"
    replaced = server.invite("late")
    server.invite("late")
    assert refused(lambda: server.redeem(replaced)) == "JOIN_TOKEN_UNKNOWN"
    wrong = server.invite("guessed")
    identifier, _, secret = wrong.token.partition(".")
    for token in ("", "x", ".", f"{identifier}.", f"{identifier}.{secret[:-1]}{'A' if secret[-1] != 'A' else 'B'}"):
        wrong.token = token
        assert refused(lambda: server.redeem(wrong)) == "JOIN_TOKEN_UNKNOWN"


def test_the_identity_is_the_tokens_whatever_the_request_says(server: ServerProcess) -> None:
    server.enroll("victim")
    invitation = server.invite("thief", role="evaluator")
    key = ec.generate_private_key(ec.SECP256R1())
    csr = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "victim")]))
        .add_extension(
            x509.SubjectAlternativeName([x509.UniformResourceIdentifier("spiffe://fsllm/operator/victim")]),
            critical=False,
        )
        .sign(key, hashes.SHA256())
        .public_bytes(serialization.Encoding.PEM)
    )
    channel = grpc.secure_channel(
        f"localhost:{invitation.enrollment_port}", enrollment_channel_credentials(invitation.ca_certificate)
    )
    stub = EnrollmentServiceStub(channel)
    answer = stub.Redeem(RedeemRequest(token=invitation.token, csr=csr), timeout=CALL_SECONDS)
    leaf = x509.load_pem_x509_certificate(answer.certificate_chain)
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.UniformResourceIdentifier) == ["spiffe://fsllm/evaluator/thief"]
    # A request that is none, or for another kind of key.
    weak = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    p384 = weak.sign(ec.generate_private_key(ec.SECP384R1()), hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
    token = server.invite("weak").token
    for bad in (b"", b"no request", p384):
        redeem = partial(stub.Redeem, RedeemRequest(token=token, csr=bad), timeout=CALL_SECONDS)
        assert refused(redeem) == "CSR_INVALID"


@pytest.mark.parametrize(
    ("name", "role", "seconds", "reason"),
    [
        ("No-Capitals", "site", 60, "NAME_INVALID"),
        ("", "site", 60, "NAME_INVALID"),
        ("a", "queen", 60, "NAME_INVALID"),
        ("a", "site", 0, "SETTING_INVALID"),
        ("a", "site", 10**9, "SETTING_INVALID"),
    ],
)
def test_invitations_that_are_refused(server: ServerProcess, name: str, role: str, seconds: int, reason: str) -> None:
    assert refused(lambda: server.invite(name, role, seconds)) == reason


def test_the_enrolment_port_does_nothing_else(server: ServerProcess) -> None:
    credential = server.enroll("at-the-wrong-port")
    target = f"localhost:{server.told['enrollment_port']}"
    stub = FederationServiceStub(grpc.secure_channel(target, enrollment_channel_credentials(credential.authority)))
    with pytest.raises(grpc.RpcError) as error:
        stub.UploadStatus(pb.UploadStatusRequest(), timeout=CALL_SECONDS)
    assert error.value.code() is grpc.StatusCode.UNIMPLEMENTED


# Roles.


def test_every_method_serves_its_roles_and_no_other(server: ServerProcess) -> None:
    services = (
        pb.DESCRIPTOR.services_by_name["FederationService"],
        control.DESCRIPTOR.services_by_name["ControlService"],
    )
    methods = {f"/{service.full_name}/{method.name}": method for service in services for method in service.methods}
    assert methods.keys() <= ROLES.keys()
    for role in Role:
        channel = server.channel(server.enroll(f"tries-as-{role}", role))
        for path, method in methods.items():
            # In raw bytes; an empty request is a valid message of any kind, and none of these does harm.
            kind = (
                f"{'stream' if method.client_streaming else 'unary'}_{'stream' if method.server_streaming else 'unary'}"
            )
            call = getattr(channel, kind)(path, request_serializer=None, response_deserializer=None)
            reason = "OK"
            try:
                answer = call(iter([b""]) if method.client_streaming else b"", timeout=CALL_SECONDS)
                if method.server_streaming:
                    list(answer)
            except grpc.RpcError as error:
                reason = reason_of(error)
            assert (reason == "ROLE_FORBIDDEN") is (role not in ROLES[path]), (role, path, reason)


# Revocation.


def test_revocation_ends_live_streams_at_once_and_the_name_can_come_back(server: ServerProcess) -> None:
    credential = server.enroll("leaver")
    stream = Peer(server, credential).attach()
    listed = server.control().ListMembers(control.ListMembersRequest(), timeout=CALL_SECONDS).members
    (shown,) = (member for member in listed if member.name == "leaver")
    assert (shown.attached, shown.software_version, shown.standing) == (True, "test", "enrolled")
    revoked = server.control().RevokeMember(control.RevokeMemberRequest(name="leaver"), timeout=CALL_SECONDS)
    assert revoked.member.standing == "revoked"
    assert reason_of(stream.error()) == "MEMBER_REVOKED"
    assert refused(status_call(server, credential)) == "MEMBER_REVOKED"
    stub = FederationServiceStub(server.channel(credential))
    renewal = pb.RenewRequest(csr=make_request(make_key()))
    assert refused(lambda: stub.Renew(renewal, timeout=CALL_SECONDS)) == "MEMBER_REVOKED"
    back = server.enroll("leaver")
    assert status_call(server, back)()
    assert refused(status_call(server, credential)) == "MEMBER_REVOKED"


def test_revoking_an_invitation_and_nobody(server: ServerProcess) -> None:
    invitation = server.invite("changed-our-mind")
    listed = server.control().ListMembers(control.ListMembersRequest(), timeout=CALL_SECONDS).members
    assert ("changed-our-mind", "invited") in {(member.name, member.standing) for member in listed}
    server.control().RevokeMember(control.RevokeMemberRequest(name="changed-our-mind"), timeout=CALL_SECONDS)
    assert refused(lambda: server.redeem(invitation)) == "JOIN_TOKEN_UNKNOWN"
    nobody = control.RevokeMemberRequest(name="nobody")
    assert refused(lambda: server.control().RevokeMember(nobody, timeout=CALL_SECONDS)) == "MEMBER_UNKNOWN"


def test_revoking_the_hosts_operator_makes_copies_void(server: ServerProcess) -> None:
    stolen = server.operator()
    request = control.RevokeMemberRequest(name="local-operator")
    server.control(stolen).RevokeMember(request, timeout=CALL_SECONDS)
    ask = control.GetServerRequest()
    assert refused(lambda: server.control(stolen).GetServer(ask, timeout=CALL_SECONDS)) == "MEMBER_REVOKED"
    assert server.control().GetServer(ask, timeout=CALL_SECONDS).federation == "fsllm"


def test_records_survive_a_kill(tmp_path: Path) -> None:
    with ServerProcess(tmp_path / "server") as server:
        stays, leaves, invited = server.enroll("stays"), server.enroll("leaves"), server.invite("comes")
        server.control().RevokeMember(control.RevokeMemberRequest(name="leaves"), timeout=CALL_SECONDS)
        server.kill()
        server.restart()
        assert status_call(server, stays)()
        assert refused(status_call(server, leaves)) == "MEMBER_REVOKED"
        assert server.redeem(invited).member.name == "comes"


# The stream of orders.


def test_what_must_come_first(server: ServerProcess) -> None:
    peer = Peer(server, server.enroll("clumsy"))
    silent = Stream(peer.stub.Attach)
    silent.close()
    assert reason_of(silent.error()) == "HELLO_EXPECTED"
    hasty = Stream(peer.stub.Attach)
    hasty.put(pb.AttachRequest(heartbeat=pb.Heartbeat()))
    assert reason_of(hasty.error()) == "HELLO_EXPECTED"
    modern = Stream(peer.stub.Attach)
    modern.put(pb.AttachRequest(hello=pb.Hello(protocol_version=99)))
    assert reason_of(modern.error()) == "PROTOCOL_VERSION"
    twice = peer.attach()
    twice.put(pb.AttachRequest(hello=pb.Hello(protocol_version=1)))
    assert reason_of(twice.error()) == "HELLO_EXPECTED"


def test_a_second_daemon_of_the_same_site(server: ServerProcess) -> None:
    credential = server.enroll("twofold")
    first, second = Peer(server, credential), Peer(server, credential)
    old = first.attach()
    new = second.attach()
    assert reason_of(old.error()) == "ATTACHED_ELSEWHERE"
    # An answer to an order that nobody gave does not end the stream; closing our half does, in good order.
    new.put(pb.AttachRequest(answer=pb.Answer(order_id="none.1", done=pb.Done())))
    new.put(pb.AttachRequest(heartbeat=pb.Heartbeat()))
    new.close()
    assert list(new.call) == []
    listed = server.control().ListMembers(control.ListMembersRequest(), timeout=CALL_SECONDS).members
    (shown,) = (member for member in listed if member.name == "twofold")
    assert not shown.attached
