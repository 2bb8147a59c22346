"""Why a server can not be reached: gRPC says 'connection closed' for everything, so we knock once by ourselves."""

import asyncio
import ssl
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from fsllm_common.errors import FsllmError, Unavailable
from fsllm_common.identity.keys import Certificate, Credential
from fsllm_common.telemetry.logs import get_logger

log = get_logger()

CONNECT_SECONDS: Final = 5.0
_ALERT_SECONDS: Final = 1.0
"""TLS 1.3: a server refuses a client's certificate only after the handshake, within a round trip."""


async def diagnose(server: str, authority: bytes, credential: Credential | None = None) -> FsllmError | None:
    """Return why ``knock`` fails; None when it does not."""
    try:
        await knock(server, authority, credential)
    except FsllmError as error:
        return error
    return None


async def knock(server: str, authority: bytes, credential: Credential | None = None) -> Certificate:
    """Connect by TCP and then TLS and return the server's certificate.

    Args:
        server: ``host:port``.
        authority: PEM of the CA that must have issued the server's certificate.
        credential: This member's, on the main port; None on the enrolment port.

    Raises:
        FsllmError: SERVER_UNREACHABLE, CERTIFICATE_UNTRUSTED, CERTIFICATE_EXPIRED: the real cause.

    """
    host, _, port = server.rpartition(":")
    host = host.strip("[]")
    context = _context(authority, credential)
    try:
        async with asyncio.timeout(CONNECT_SECONDS):
            _, writer = await asyncio.open_connection(host, int(port))
            writer.close()
    except TimeoutError:
        raise _unreachable(f"{server} does not answer within {CONNECT_SECONDS:g} s: a firewall?") from None
    except OSError as error:
        raise _unreachable(f"{server}: {error.strerror or error}") from error
    try:
        async with asyncio.timeout(CONNECT_SECONDS):
            reader, writer = await asyncio.open_connection(host, int(port), ssl=context, server_hostname=host)
    except TimeoutError:
        raise _unreachable(f"{server} accepts connections but does not speak TLS") from None
    except ssl.SSLCertVerificationError as error:
        raise _untrusted(server, host, error) from error
    except OSError as error:
        raise _refused(server, error) from error
    der = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    try:
        async with asyncio.timeout(_ALERT_SECONDS):
            greeting = await reader.read(1)
        if not greeting and credential is not None:
            raise FsllmError("CERTIFICATE_UNTRUSTED", f"{server} closes the connection on this member's certificate")
    except TimeoutError:
        log.debug("the server keeps the connection but says nothing", server=server)
    except OSError as error:
        raise _refused(server, error) from error
    finally:
        writer.transport.abort()
    return Certificate.parse(ssl.DER_cert_to_PEM_cert(der).encode())


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


def _untrusted(server: str, host: str, error: ssl.SSLCertVerificationError) -> FsllmError:
    what = error.verify_message
    match error.verify_code:
        case 9 | 10:  # X509_V_ERR_CERT_NOT_YET_VALID, X509_V_ERR_CERT_HAS_EXPIRED
            return FsllmError(
                "CERTIFICATE_EXPIRED",
                f"The certificate of {server} is not valid now, {datetime.now(UTC):%Y-%m-%d %H:%M} UTC here: {what}",
                cure="Compare this host's clock with the server's; a running server renews its own certificate.",
            )
        case 62 | 64:  # X509_V_ERR_HOSTNAME_MISMATCH, X509_V_ERR_IP_ADDRESS_MISMATCH
            return FsllmError(
                "CERTIFICATE_UNTRUSTED",
                f"The certificate of {server} does not name {host!r}: {what}",
                cure="Use a name or address that the server's certificate holds, or have the operator add this one.",
            )
    return FsllmError("CERTIFICATE_UNTRUSTED", f"The certificate of {server} is not from this federation's CA: {what}")


def _unreachable(message: str) -> FsllmError:
    return Unavailable("SERVER_UNREACHABLE", message)


def _refused(server: str, error: OSError) -> FsllmError:
    text = getattr(error, "reason", None) or error.strerror or str(error)
    if "EXPIRED" in text:
        return FsllmError("CERTIFICATE_EXPIRED", f"{server} says that this member's certificate has expired")
    if "UNKNOWN_CA" in text or "BAD_CERTIFICATE" in text or "CERTIFICATE_UNKNOWN" in text:
        return FsllmError("CERTIFICATE_UNTRUSTED", f"{server} does not trust this member's certificate: {text}")
    return _unreachable(f"{server}: the TLS connection fails: {text}")
