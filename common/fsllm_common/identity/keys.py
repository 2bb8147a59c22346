"""A member's credential: key, certificate chain and the authority it trusts, in one file that is replaced at once.

Key and chain in ONE file: after a crash at any instant they still belong together.
"""

import hashlib
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from fsllm_common.errors import FsllmError
from fsllm_common.files import write_atomic
from fsllm_common.identity.names import Member

MAX_CSR: Final = 16_384
"""Bytes of a certificate signing request."""
CREDENTIAL_FILE: Final = "credential.pem"
RENEW_AFTER: Final = 2 / 3
"""Of a certificate's life."""


@dataclass(frozen=True, slots=True)
class Certificate:
    """What one certificate says."""

    not_before: datetime
    not_after: datetime
    serial: int
    uri: str | None
    """The member's URI; None in the server's own certificate."""
    fingerprint: str
    """SHA-256 of the certificate, hexadecimal."""

    @classmethod
    def parse(cls, pem: bytes) -> "Certificate":
        """Read the first certificate of a PEM.

        Raises:
            ValueError: There is none.

        """
        return _facts(x509.load_pem_x509_certificate(pem))

    @property
    def renew_at(self) -> datetime:
        """When two thirds of its life are over."""
        return self.not_before + (self.not_after - self.not_before) * RENEW_AFTER

    @property
    def serial_hex(self) -> str:
        """The serial number as it is stored and compared: lower-case hexadecimal without padding."""
        return f"{self.serial:x}"


@dataclass(frozen=True, slots=True)
class Credential:
    """What a TLS end needs: its key, its chain (leaf first) and the authority whose peers it trusts, all PEM."""

    key: bytes
    chain: bytes
    authority: bytes

    def __repr__(self) -> str:
        """Return nothing of the key."""
        return f"Credential({self.certificate.uri or 'server'}, until {self.certificate.not_after:%Y-%m-%d %H:%M} UTC)"

    @property
    def certificate(self) -> Certificate:
        """The leaf."""
        return Certificate.parse(self.chain)

    @property
    def member(self) -> Member:
        """Whom the leaf names.

        Raises:
            FsllmError: IDENTITY_MISSING: it is a server's certificate.

        """
        return Member.parse(self.certificate.uri or "")


def make_key() -> bytes:
    """Return a new P-256 private key in PEM. It never leaves the host."""
    return ec.generate_private_key(ec.SECP256R1()).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def make_request(key_pem: bytes) -> bytes:
    """Return a certificate signing request in PEM. It names nobody: the identity comes from the authority's record."""
    key = serialization.load_pem_private_key(key_pem, None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise TypeError("the key is not an elliptic curve key")
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fsllm")])
    request = x509.CertificateSigningRequestBuilder().subject_name(name).sign(key, hashes.SHA256())
    return request.public_bytes(serialization.Encoding.PEM)


def request_fingerprint(csr_pem: bytes) -> str:
    """Return SHA-256 of a request's public key: the same key gets the same certificate again.

    Raises:
        FsllmError: CSR_INVALID.

    """
    if len(csr_pem) > MAX_CSR:
        raise FsllmError("CSR_INVALID", f"A certificate signing request has at most {MAX_CSR} bytes")
    try:
        key = x509.load_pem_x509_csr(csr_pem).public_key()
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise FsllmError("CSR_INVALID", "The certificate signing request can not be read") from error
    der = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(der).hexdigest()


def accept_chain(key_pem: bytes, chain_pem: bytes, authority_pem: bytes) -> Credential:
    """Return the credential made of our key, the chain that a server sent for it, and the authority we trust.

    Raises:
        FsllmError: CERTIFICATE_UNTRUSTED: the chain is not for our key or not by our authority. CERTIFICATE_EXPIRED:
            also when this host's clock is wrong. STATE_CORRUPT: the server sent no certificate.

    """
    try:
        leaf = x509.load_pem_x509_certificate(chain_pem).public_bytes(serialization.Encoding.PEM)
    except ValueError as error:
        raise FsllmError("STATE_CORRUPT", "The server sent no readable certificate") from error
    credential = Credential(key_pem, leaf + authority_pem, authority_pem)
    check_credential(credential)
    return credential


def save_credential(folder: Path, credential: Credential) -> None:
    """Store a credential in ``folder``, readable by its owner only, in the place of the one before.

    Raises:
        FsllmError: DISK_FULL.

    """
    data = b"".join(part if part.endswith(b"\n") else part + b"\n" for part in (credential.key, credential.chain))
    write_atomic(folder / CREDENTIAL_FILE, data, mode=0o600)


def load_credential(folder: Path) -> Credential:
    """Read the credential of ``folder``. Check it with ``check_credential`` before it is used.

    Raises:
        FsllmError: NOT_ENROLLED: there is none. STATE_CORRUPT: it is damaged.

    """
    path = folder / CREDENTIAL_FILE
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise FsllmError("NOT_ENROLLED", f"There is no credential at {path}") from error
    try:
        key = serialization.load_pem_private_key(data, None)
        chain = x509.load_pem_x509_certificates(data)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise FsllmError("STATE_CORRUPT", f"{path} holds no readable key and certificate") from error
    if len(chain) < 2:
        raise FsllmError("STATE_CORRUPT", f"{path} lacks the authority's certificate")
    pem = [certificate.public_bytes(serialization.Encoding.PEM) for certificate in chain]
    return Credential(
        key=key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        ),
        chain=b"".join(pem),
        authority=pem[-1],
    )


def check_credential(credential: Credential, now: datetime | None = None) -> None:
    """Say the real cause why a peer would refuse this credential; TLS itself only says 'connection closed'.

    Raises:
        FsllmError: CERTIFICATE_UNTRUSTED: signed by another authority, or the key is another's. CERTIFICATE_EXPIRED:
            its time is over, or has not begun by this host's clock.

    """
    now = now or datetime.now(UTC)
    leaf = x509.load_pem_x509_certificate(credential.chain)
    key = serialization.load_pem_private_key(credential.key, None)
    who = _facts(leaf).uri or "the server"
    if key.public_key() != leaf.public_key():
        raise FsllmError("CERTIFICATE_UNTRUSTED", f"The key does not belong to the certificate of {who}")
    try:
        leaf.verify_directly_issued_by(x509.load_pem_x509_certificate(credential.authority))
    except (ValueError, TypeError, InvalidSignature) as error:
        raise FsllmError(
            "CERTIFICATE_UNTRUSTED", f"The certificate of {who} was not issued by this federation's authority"
        ) from error
    if now > leaf.not_valid_after_utc:
        raise FsllmError(
            "CERTIFICATE_EXPIRED", f"The certificate of {who} expired at {leaf.not_valid_after_utc:%Y-%m-%d %H:%M} UTC"
        )
    if now < leaf.not_valid_before_utc:
        raise FsllmError(
            "CERTIFICATE_EXPIRED",
            f"The certificate of {who} is valid from {leaf.not_valid_before_utc:%Y-%m-%d %H:%M} UTC, but this host's "
            f"clock says {now:%Y-%m-%d %H:%M} UTC",
            cure="Set this host's clock right.",
        )


def _facts(certificate: x509.Certificate) -> Certificate:
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    except x509.ExtensionNotFound:
        uris = []
    return Certificate(
        not_before=certificate.not_valid_before_utc,
        not_after=certificate.not_valid_after_utc,
        serial=certificate.serial_number,
        uri=uris[0] if len(uris) == 1 else None,
        fingerprint=certificate.fingerprint(hashes.SHA256()).hex(),
    )
