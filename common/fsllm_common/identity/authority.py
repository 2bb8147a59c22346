"""The federation's own certificate authority: one P-256 key in a folder, and short-lived certificates.

Member certificates carry who they are in a URI subject alternative name, and nothing that the newcomer wrote in its
request but the public key.
"""

import ipaddress
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fsllm_common.errors import FsllmError
from fsllm_common.files import write_atomic
from fsllm_common.identity.keys import MAX_CSR
from fsllm_common.identity.names import Member

AUTHORITY_LIFETIME: Final = timedelta(days=3652)
MEMBER_LIFETIME: Final = timedelta(hours=24)
CLOCK_TOLERANCE: Final = timedelta(minutes=5)
"""Certificates are valid from so long ago, for peers whose clock is behind."""

AUTHORITY_FILE: Final = "authority.pem"
"""In the authority's folder: its key and its certificate."""


class CertificateAuthority:
    """Signs certificates for one federation. Key and certificate lie in ONE file, so that they always belong
    together."""

    def __init__(self, key: ec.EllipticCurvePrivateKey, certificate: x509.Certificate) -> None:
        self._key = key
        self.certificate = certificate

    @classmethod
    def create(cls, folder: Path, federation: str) -> "CertificateAuthority":
        """Make a new authority and store it in ``folder``, readable by its owner only.

        Raises:
            FileExistsError: There is one already.
            FsllmError: DISK_FULL.

        """
        path = folder / AUTHORITY_FILE
        if path.exists():
            raise FileExistsError(path)
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name(
            [
                x509.NameAttribute(NameOID.ORGANIZATION_NAME, "fsllm"),
                x509.NameAttribute(NameOID.COMMON_NAME, f"{federation} federation CA"),
            ]
        )
        now = datetime.now(UTC)
        certificate = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - CLOCK_TOLERANCE)
            .not_valid_after(now + AUTHORITY_LIFETIME)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(sign_certificates=True), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key()), critical=False)
            .sign(key, hashes.SHA256())
        )
        pem = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        write_atomic(path, pem + certificate.public_bytes(serialization.Encoding.PEM), mode=0o600)
        return cls(key, certificate)

    @classmethod
    def load(cls, folder: Path) -> "CertificateAuthority":
        """Read the authority of ``folder``.

        Raises:
            FileNotFoundError: There is none.
            FsllmError: STATE_CORRUPT: the file is damaged, or key and certificate do not belong together.

        """
        path = folder / AUTHORITY_FILE
        data = path.read_bytes()
        try:
            key = serialization.load_pem_private_key(data, None)
            certificate = x509.load_pem_x509_certificate(data)
        except (ValueError, TypeError, UnsupportedAlgorithm) as error:
            raise FsllmError("STATE_CORRUPT", f"{path} holds no readable key and certificate") from error
        if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
            raise FsllmError("STATE_CORRUPT", f"{path}: the key is not the certificate's")
        return cls(key, certificate)

    @classmethod
    def open(cls, folder: Path, federation: str) -> "CertificateAuthority":
        """Load the authority of ``folder``, or make it when there is none."""
        try:
            return cls.load(folder)
        except FileNotFoundError:
            return cls.create(folder, federation)

    @property
    def pem(self) -> bytes:
        """The authority's certificate, which every member trusts."""
        return self.certificate.public_bytes(serialization.Encoding.PEM)

    def issue(self, csr_pem: bytes, member: Member, lifetime: timedelta = MEMBER_LIFETIME) -> bytes:
        """Return a member's certificate chain in PEM, leaf first. Only the public key is taken from the request.

        Raises:
            FsllmError: CSR_INVALID.

        """
        return self._sign(_request_key(csr_pem), member.name, [x509.UniformResourceIdentifier(member.uri)], lifetime)

    def issue_server(self, csr_pem: bytes, hosts: Sequence[str], lifetime: timedelta = MEMBER_LIFETIME) -> bytes:
        """Return the server's certificate chain in PEM for host names and IP addresses, leaf first.

        Raises:
            FsllmError: CSR_INVALID.

        """
        return self._sign(_request_key(csr_pem), hosts[0], [_host(host) for host in hosts], lifetime)

    def _sign(
        self, key: ec.EllipticCurvePublicKey, name: str, alternatives: list[x509.GeneralName], lifetime: timedelta
    ) -> bytes:
        now = datetime.now(UTC)
        # A common name of more than 64 characters is not allowed; nobody reads it anyway.
        certificate = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name[:64])]))
            .issuer_name(self.certificate.subject)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - CLOCK_TOLERANCE)
            .not_valid_after(min(now + lifetime, self.certificate.not_valid_after_utc))
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(sign_certificates=False), critical=True)
            .add_extension(
                x509.ExtendedKeyUsage(
                    [
                        ExtendedKeyUsageOID.SERVER_AUTH
                        if not isinstance(alternatives[0], x509.UniformResourceIdentifier)
                        else ExtendedKeyUsageOID.CLIENT_AUTH
                    ]
                ),
                critical=False,
            )
            .add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        return certificate.public_bytes(serialization.Encoding.PEM) + self.pem


def _usage(*, sign_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not sign_certificates,
        key_cert_sign=sign_certificates,
        crl_sign=sign_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _request_key(csr_pem: bytes) -> ec.EllipticCurvePublicKey:
    """Return the public key of a certificate signing request that its holder has signed.

    Raises:
        FsllmError: CSR_INVALID.

    """
    if len(csr_pem) > MAX_CSR:
        raise FsllmError("CSR_INVALID", f"The request has {len(csr_pem)} bytes; at most {MAX_CSR} are allowed")
    try:
        request = x509.load_pem_x509_csr(csr_pem)
        key = request.public_key()
        signed = request.is_signature_valid
    except (ValueError, TypeError, UnsupportedAlgorithm, InvalidSignature) as error:
        raise FsllmError("CSR_INVALID", "The certificate signing request can not be read") from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise FsllmError("CSR_INVALID", "The request's key is not ECDSA P-256")
    if not signed:
        raise FsllmError("CSR_INVALID", "The request is not signed by its own key")
    return key


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)
