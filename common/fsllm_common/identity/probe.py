"""Why a connection fails: gRPC says 'Socket closed' for most causes, and a handshake of our own says which."""

import socket
import ssl
from pathlib import Path
from typing import Final

from fsllm_common.errors import FsllmError, Unavailable
from fsllm_common.identity.keys import CREDENTIAL_FILE, check_credential, load_credential

TIMEOUT: Final = 5.0
"""Seconds for each of: connecting, the handshake, the server's first byte."""

_HTTP2_PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00"
_EXPIRED: Final = 10  # X509_V_ERR_CERT_HAS_EXPIRED
_NOT_YET: Final = 9  # X509_V_ERR_CERT_NOT_YET_VALID
_OTHER_NAME: Final = (62, 64)  # X509_V_ERR_HOSTNAME_MISMATCH, X509_V_ERR_IP_ADDRESS_MISMATCH


def why_unreachable(host: str, port: int, credential_folder: Path) -> FsllmError | None:
    """Connect as a member would, and return what stands in the way; None when the server would talk to us.

    Blocks for up to three times ``TIMEOUT``: call it in a thread.

    Args:
        host: As a person gave it.
        port: The server's main port.
        credential_folder: Where ``save_credential`` stored the member's credential.

    """
    try:
        credential = load_credential(credential_folder)
        check_credential(credential)
    except FsllmError as error:
        return error
    context = ssl.create_default_context(cadata=credential.authority.decode())
    context.set_alpn_protocols(["h2"])
    context.load_cert_chain(credential_folder / CREDENTIAL_FILE)
    try:
        with (
            socket.create_connection((host, port), TIMEOUT) as plain,
            context.wrap_socket(plain, server_hostname=host) as secure,
        ):
            # In TLS 1.3 the server's verdict on our certificate comes only after the handshake.
            secure.sendall(_HTTP2_PREFACE)
            if secure.recv(1):
                return None
            return FsllmError("CERTIFICATE_UNTRUSTED", f"{host}:{port} closed the connection on seeing our certificate")
    except ssl.SSLCertVerificationError as error:
        return _about_their_certificate(f"{host}:{port}", error)
    except ssl.SSLError as error:
        return FsllmError(
            "CERTIFICATE_UNTRUSTED", f"{host}:{port} refused our certificate or is no TLS server ({error.reason})"
        )
    except socket.gaierror:
        return Unavailable("SERVER_UNREACHABLE", f"The host name {host!r} is not known here")
    except TimeoutError:
        return Unavailable("SERVER_UNREACHABLE", f"{host}:{port} does not answer; a firewall may drop the packets")
    except ConnectionRefusedError:
        return Unavailable("SERVER_UNREACHABLE", f"Nothing listens on {host}:{port}")
    except ConnectionResetError:
        return FsllmError("CERTIFICATE_UNTRUSTED", f"{host}:{port} closed the connection on seeing our certificate")
    except OSError as error:
        return Unavailable("SERVER_UNREACHABLE", f"{host}:{port}: {error.strerror or error}")


def _about_their_certificate(where: str, error: ssl.SSLCertVerificationError) -> FsllmError:
    if error.verify_code in (_EXPIRED, _NOT_YET):
        return FsllmError(
            "CERTIFICATE_UNTRUSTED",
            f"The certificate of {where} is not valid now ({error.verify_message})",
            cure="Compare this host's clock with the server's; if both are right, restart the server.",
        )
    if error.verify_code in _OTHER_NAME:
        return FsllmError(
            "CERTIFICATE_UNTRUSTED",
            f"The server at {where} does not go by that name ({error.verify_message})",
            cure="Use a name or address that the server's setting `hosts` lists, or add this one there.",
        )
    return FsllmError("CERTIFICATE_UNTRUSTED", f"{where} is not a server of our federation ({error.verify_message})")
