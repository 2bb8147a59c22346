"""Why a connection fails: gRPC says 'Socket closed' for most causes, and a handshake of our own says which."""

import socket
import ssl
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from fsllm_common.errors import FsllmError, Unavailable
from fsllm_common.identity.keys import Certificate, Credential, check_credential, load_credential

TIMEOUT: Final = 5.0
"""Seconds for each of: connecting, the handshake, the server's first byte."""
PAUSE: Final = 1.0
"""Seconds between two tries of a handshake whose end says nothing certain."""

_HTTP2_PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00"
_OUT_OF_TIME: Final = (9, 10)  # X509_V_ERR_CERT_NOT_YET_VALID, X509_V_ERR_CERT_HAS_EXPIRED
_OTHER_NAME: Final = (62, 64)  # X509_V_ERR_HOSTNAME_MISMATCH, X509_V_ERR_IP_ADDRESS_MISMATCH


def knock(server: str, authority: bytes, credential: Credential | None = None) -> Certificate:
    """Connect by TCP, then TLS, and return the server's certificate.

    Blocks for up to six times ``TIMEOUT``: call it in a thread.

    Args:
        server: ``host:port``, as a person gave it.
        authority: PEM of the CA that must have issued the server's certificate.
        credential: This member's, on the main port; None on the enrolment port.

    Raises:
        FsllmError: SERVER_UNREACHABLE, CERTIFICATE_UNTRUSTED, CERTIFICATE_EXPIRED: the real cause.

    """
    host, _, port = server.rpartition(":")
    host = host.strip("[]")
    context = _context(authority, credential)
    for last in (False, True):
        if (certificate := _shake_hands(server, host, int(port), context)) is not None:
            return certificate
        if not last:
            # A server that does not like our certificate closes the connection; so does one that ends at this moment.
            time.sleep(PAUSE)
    raise FsllmError(
        "CERTIFICATE_UNTRUSTED", f"{server} does not trust our certificate: it closes the connection on seeing it"
    )


def _shake_hands(server: str, host: str, port: int, context: ssl.SSLContext) -> Certificate | None:
    """Return the server's certificate; None when the server closes the connection after the handshake."""
    try:
        plain = socket.create_connection((host, port), TIMEOUT)
    except socket.gaierror:
        raise Unavailable("SERVER_UNREACHABLE", f"The host name {host!r} is not known here") from None
    except TimeoutError:
        raise Unavailable("SERVER_UNREACHABLE", f"{server} does not answer; a firewall may drop the packets") from None
    except ConnectionRefusedError:
        raise Unavailable("SERVER_UNREACHABLE", f"Nothing listens on {server}") from None
    except OSError as error:
        raise Unavailable("SERVER_UNREACHABLE", f"{server}: {error.strerror or error}") from error
    try:
        with plain, context.wrap_socket(plain, server_hostname=host) as secure:
            theirs = ssl.DER_cert_to_PEM_cert(secure.getpeercert(binary_form=True) or b"")
            # In TLS 1.3 the server's verdict on our certificate comes only after the handshake.
            try:
                secure.sendall(_HTTP2_PREFACE)
                heard = secure.recv(1)
            except ConnectionError:
                heard = b""
            return Certificate.parse(theirs.encode()) if heard else None
    except ssl.SSLCertVerificationError as error:
        raise _about_their_certificate(server, host, error) from error
    except ssl.SSLError as error:
        raise _about_ours(server, error) from error
    except TimeoutError:
        raise Unavailable("SERVER_UNREACHABLE", f"{server} accepts connections but does not speak TLS") from None
    except OSError as error:
        raise Unavailable("SERVER_UNREACHABLE", f"{server}: {error.strerror or error}") from error


def why_unreachable(server: str, credential_folder: Path) -> FsllmError | None:
    """Knock as the member whose credential ``save_credential`` stored; return what stands in the way, or None."""
    try:
        credential = load_credential(credential_folder)
        check_credential(credential)
        knock(server, credential.authority, credential)
    except FsllmError as error:
        return error
    return None


def _context(authority: bytes, credential: Credential | None) -> ssl.SSLContext:
    context = ssl.create_default_context(cadata=authority.decode("ascii"))
    context.set_alpn_protocols(["h2"])
    if credential is not None:
        # The ssl module takes a client's key from a file only.
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "credential.pem"
            path.touch(mode=0o600)
            path.write_bytes(credential.key + credential.chain)
            context.load_cert_chain(path)
    return context


def _about_their_certificate(server: str, host: str, error: ssl.SSLCertVerificationError) -> FsllmError:
    what = error.verify_message
    if error.verify_code in _OUT_OF_TIME:
        return FsllmError(
            "CERTIFICATE_EXPIRED",
            f"The certificate of {server} is not valid now, {datetime.now(UTC):%Y-%m-%d %H:%M} UTC here: {what}",
            cure="Compare this host's clock with the server's; a running server renews its own certificate.",
        )
    if error.verify_code in _OTHER_NAME:
        return FsllmError(
            "CERTIFICATE_UNTRUSTED",
            f"The certificate of {server} does not name {host!r}: {what}",
            cure="Use a name or address that the server's certificate holds, or start fsllm-server with --host NAME.",
        )
    return FsllmError("CERTIFICATE_UNTRUSTED", f"The certificate of {server} is not from this federation's CA: {what}")


def _about_ours(server: str, error: ssl.SSLError) -> FsllmError:
    text = error.reason or str(error)
    if "EXPIRED" in text:
        return FsllmError("CERTIFICATE_EXPIRED", f"{server} says that our certificate has expired")
    if any(alert in text for alert in ("UNKNOWN_CA", "BAD_CERTIFICATE", "CERTIFICATE_UNKNOWN", "DECRYPT_ERROR")):
        return FsllmError("CERTIFICATE_UNTRUSTED", f"{server} does not trust our certificate: {text}")
    return Unavailable("SERVER_UNREACHABLE", f"{server}: the TLS connection fails: {text}")
