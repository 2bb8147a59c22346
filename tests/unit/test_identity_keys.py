import os
import stat
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import ParamSpec, TypeVar

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID
from hypothesis import given
from hypothesis import strategies as st

from fsllm_common.errors import FsllmError
from fsllm_common.identity import keys
from fsllm_common.identity.authority import CertificateAuthority
from fsllm_common.identity.keys import (
    Credential,
    check_credential,
    load_credential,
    make_key,
    make_request,
    request_fingerprint,
    save_credential,
)
from fsllm_common.identity.names import Member, Role, check_name

P = ParamSpec("P")
R = TypeVar("R")

SITE = Member("lab", Role.SITE, "hospital-a")


@pytest.fixture
def authority(tmp_path: Path) -> CertificateAuthority:
    return CertificateAuthority.create(tmp_path / "ca", "lab")


def issue(authority: CertificateAuthority, **lifetime: timedelta) -> Credential:
    key = make_key()
    return Credential(key, authority.issue(make_request(key), SITE, **lifetime), authority.pem)


# Names.


@pytest.mark.parametrize("name", ["a", "7", "hospital-a", "a" * 63, "a--b"])
def test_names(name: str) -> None:
    assert check_name(name) == name


@pytest.mark.parametrize("name", ["", "-a", "a-", "A", "a_b", "a" * 64, "a/b", "a.b", "ä", "a\n", " a"])
def test_what_is_no_name(name: str) -> None:
    with pytest.raises(FsllmError) as caught:
        check_name(name)
    assert caught.value.reason == "NAME_INVALID"


names = st.from_regex(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", fullmatch=True)


@given(names, st.sampled_from(Role), names)
def test_a_members_uri_reads_back(federation: str, role: Role, name: str) -> None:
    member = Member.of(federation, role, name)
    assert member.uri == f"spiffe://{federation}/{role.value}/{name}"
    assert Member.parse(member.uri) == member


@pytest.mark.parametrize(
    "uri",
    [
        "",
        "spiffe://lab/site",
        "spiffe://lab/site/",
        "spiffe://lab//a",
        "spiffe://lab/site/a/b",
        "spiffe://lab/site/a?x",
        "spiffe://lab/site/a#x",
        "spiffe://lab/king/a",
        "https://lab/site/a",
        "SPIFFE://lab/site/a",
        "spiffe://u@lab/site/a",
        "spiffe://lab:1/site/a",
        "spiffe:///site/a",
        "spiffe://lab/site/A",
        "spiffe://lab/site/a\n",
    ],
)
def test_what_is_no_members_uri(uri: str) -> None:
    with pytest.raises(FsllmError) as caught:
        Member.parse(uri)
    assert caught.value.reason == "IDENTITY_MISSING"


# The authority.


def test_the_authority_is_kept_and_readable_by_its_owner_only(tmp_path: Path) -> None:
    made = CertificateAuthority.open(tmp_path / "ca", "lab")
    again = CertificateAuthority.open(tmp_path / "ca", "lab")
    assert again.certificate == made.certificate
    (file,) = (tmp_path / "ca").iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    with pytest.raises(FileExistsError):
        CertificateAuthority.create(tmp_path / "ca", "lab")
    life = made.certificate.not_valid_after_utc - datetime.now(UTC)
    assert timedelta(days=3650) < life < timedelta(days=3654)
    assert isinstance(made.certificate.public_key(), ec.EllipticCurvePublicKey)


def test_a_damaged_authority_says_where(tmp_path: Path) -> None:
    CertificateAuthority.create(tmp_path, "lab")
    other = CertificateAuthority.create(tmp_path / "other", "lab")
    (file,) = tmp_path.glob("*.pem")
    whole = file.read_bytes()
    for damaged in (b"", whole[:100], whole[: whole.index(b"-----BEGIN CERTIFICATE")] + other.pem):
        file.write_bytes(damaged)
        with pytest.raises(FsllmError) as caught:
            CertificateAuthority.load(tmp_path)
        assert caught.value.reason == "STATE_CORRUPT"
        assert str(file) in caught.value.message


def test_a_certificate_says_what_it_should_and_nothing_of_the_request(authority: CertificateAuthority) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    lies = x509.SubjectAlternativeName([x509.UniformResourceIdentifier("spiffe://lab/operator/root")])
    request = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "root")]))
        .add_extension(lies, critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=9), critical=True)
        .sign(key, hashes.SHA256())
        .public_bytes(serialization.Encoding.PEM)
    )
    chain = x509.load_pem_x509_certificates(authority.issue(request, SITE))
    assert chain[1] == authority.certificate
    leaf = chain[0]
    extensions = leaf.extensions
    assert extensions.get_extension_for_class(x509.SubjectAlternativeName).value.get_values_for_type(
        x509.UniformResourceIdentifier
    ) == [SITE.uri]
    assert "root" not in leaf.subject.rfc4514_string()
    basic = extensions.get_extension_for_class(x509.BasicConstraints)
    assert basic.critical
    assert not basic.value.ca
    usage = extensions.get_extension_for_class(x509.KeyUsage)
    assert usage.critical
    assert usage.value.digital_signature
    assert not usage.value.key_cert_sign
    assert list(extensions.get_extension_for_class(x509.ExtendedKeyUsage).value) == [ExtendedKeyUsageOID.CLIENT_AUTH]
    assert extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value.digest
    assert extensions.get_extension_for_class(x509.AuthorityKeyIdentifier).value.key_identifier == (
        authority.certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value.digest
    )
    assert leaf.public_key() == key.public_key()
    life = leaf.not_valid_after_utc - datetime.now(UTC)
    assert timedelta(hours=23, minutes=59) < life <= timedelta(hours=24)


def _rsa_request() -> bytes:
    key = rsa.generate_private_key(public_exponent=65_537, key_size=2048)
    return (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name([]))
        .sign(key, hashes.SHA256())
        .public_bytes(serialization.Encoding.PEM)
    )


def _other_curve_request() -> bytes:
    key = ec.generate_private_key(ec.SECP384R1())
    return (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name([]))
        .sign(key, hashes.SHA256())
        .public_bytes(serialization.Encoding.PEM)
    )


def _badly_signed_request() -> bytes:
    der = bytearray(x509.load_pem_x509_csr(make_request(make_key())).public_bytes(serialization.Encoding.DER))
    der[-1] ^= 1
    return x509.load_der_x509_csr(bytes(der)).public_bytes(serialization.Encoding.PEM)


@pytest.mark.parametrize(
    "make",
    [lambda: b"", lambda: b"no", lambda: b"x" * 20_000, _rsa_request, _other_curve_request, _badly_signed_request],
)
def test_a_bad_request_is_refused(authority: CertificateAuthority, make: object) -> None:
    assert callable(make)
    with pytest.raises(FsllmError) as caught:
        authority.issue(make(), SITE)
    assert caught.value.reason == "CSR_INVALID"


def test_the_fingerprint_is_the_keys(authority: CertificateAuthority) -> None:
    key = make_key()
    assert request_fingerprint(make_request(key)) == request_fingerprint(make_request(key))
    assert request_fingerprint(make_request(key)) != request_fingerprint(make_request(make_key()))
    with pytest.raises(FsllmError, match="can not be read"):
        request_fingerprint(b"no")


# Credentials.


def test_a_credential_is_stored_for_its_owner_only_and_reads_back(
    authority: CertificateAuthority, tmp_path: Path
) -> None:
    credential = issue(authority)
    old_mask = os.umask(0)
    try:
        save_credential(tmp_path / "site", credential)
    finally:
        os.umask(old_mask)
    (file,) = (tmp_path / "site").iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    loaded = load_credential(tmp_path / "site")
    assert loaded == credential
    assert loaded.member == SITE
    check_credential(loaded)
    assert "PRIVATE" not in repr(loaded)


def test_there_is_no_moment_without_a_whole_credential(
    authority: CertificateAuthority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A crash at any system call that changes a file leaves the old credential or the new."""
    old, new = issue(authority), issue(authority)

    class Crash(BaseException):
        pass

    def crashing(after: int) -> None:
        calls = 0

        def count(real: Callable[P, R]) -> Callable[P, R]:
            def call(*args: P.args, **kwargs: P.kwargs) -> R:
                nonlocal calls
                calls += 1
                if calls == after:
                    raise Crash
                return real(*args, **kwargs)

            return call

        with monkeypatch.context() as patch:
            patch.setattr(os, "open", count(os.open))
            patch.setattr(os, "fsync", count(os.fsync))
            patch.setattr(Path, "write_bytes", count(Path.write_bytes))
            patch.setattr(Path, "replace", count(Path.replace))
            save_credential(tmp_path, new)

    survived: list[Credential] = []
    for after in range(1, 100):
        save_credential(tmp_path, old)
        try:
            crashing(after)
        except Crash:
            survived.append(load_credential(tmp_path))
            assert [p.name for p in tmp_path.iterdir() if p.is_file()] == [keys.CREDENTIAL_FILE]
        else:
            break
    assert load_credential(tmp_path) == new
    assert len(survived) >= 5
    assert all(credential in (old, new) for credential in survived)
    assert old in survived


def test_without_a_credential_the_cure_is_to_join(tmp_path: Path) -> None:
    with pytest.raises(FsllmError) as caught:
        load_credential(tmp_path)
    assert caught.value.reason == "NOT_ENROLLED"
    (tmp_path / keys.CREDENTIAL_FILE).write_text("damaged")
    with pytest.raises(FsllmError) as caught:
        load_credential(tmp_path)
    assert caught.value.reason == "STATE_CORRUPT"


def test_the_real_cause_is_said(authority: CertificateAuthority, tmp_path: Path) -> None:
    credential = issue(authority)
    now = datetime.now(UTC)
    check_credential(credential, now + timedelta(hours=23))
    check_credential(credential, now - timedelta(minutes=4))

    def cause(credential: Credential, at: datetime = now) -> FsllmError:
        with pytest.raises(FsllmError) as caught:
            check_credential(credential, at)
        return caught.value

    expired = cause(credential, now + timedelta(hours=25))
    assert expired.reason == "CERTIFICATE_EXPIRED"
    assert "expired at" in expired.message
    assert SITE.uri in expired.message
    early = cause(credential, now - timedelta(hours=1))
    assert early.reason == "CERTIFICATE_EXPIRED"
    assert "clock" in early.message
    assert "clock" in early.cure
    stranger = CertificateAuthority.create(tmp_path / "stranger", "lab")
    other = cause(Credential(credential.key, credential.chain, stranger.pem))
    assert other.reason == "CERTIFICATE_UNTRUSTED"
    assert "not issued by this federation" in other.message
    mismatch = cause(Credential(make_key(), credential.chain, credential.authority))
    assert mismatch.reason == "CERTIFICATE_UNTRUSTED"
    assert "key does not belong" in mismatch.message


def test_renewal_is_due_at_two_thirds(authority: CertificateAuthority) -> None:
    certificate = issue(authority, lifetime=timedelta(hours=24)).certificate
    life = certificate.not_after - certificate.not_before
    assert certificate.renew_at - certificate.not_before == pytest.approx(life * 2 / 3, abs=timedelta(seconds=1))
    assert int(certificate.serial_hex, 16) == certificate.serial
    assert certificate.uri == SITE.uri
