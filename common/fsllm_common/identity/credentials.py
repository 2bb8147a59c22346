"""gRPC's TLS credentials made of ours, who the peer is, and the options of every channel and server."""

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, Protocol

import grpc

from fsllm_common.errors import FsllmError
from fsllm_common.identity.keys import Certificate, Credential
from fsllm_common.identity.names import Member, Role

MAX_MESSAGE: Final = 4 * 1024 * 1024
"""Bytes; chunks and the parts of a manifest are 1 MiB, so this is a defence."""

Options = tuple[tuple[str, int], ...]

_COMMON_OPTIONS: Final[Options] = (
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    # So that a peer that is stopped, but whose host answers, is noticed. No less: on a slow line the answer waits
    # behind the megabytes of a payload in the sockets' buffers, and a connection that advances must not be cut.
    ("grpc.http2.ping_timeout_ms", 30_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # Bounds the memory of a stream; costs nothing measurable.
    ("grpc.http2.bdp_probe", 0),
    ("grpc.max_receive_message_length", MAX_MESSAGE),
)

CHANNEL_OPTIONS: Final[Options] = (*_COMMON_OPTIONS, ("grpc.http2.max_pings_without_data", 0))

SERVER_OPTIONS: Final[Options] = (
    *_COMMON_OPTIONS,
    # Must be less than the clients' keepalive_time, or they are cut off with 'too many pings'.
    ("grpc.http2.min_ping_interval_without_data_ms", 20_000),
    ("grpc.server_handshake_timeout_ms", 10_000),
    # What a connection keeps for its next read. Else it is as much as it once read at a time: a MiB, for each that has
    # ever sent an update. Known to gRPC since 1.84.
    ("grpc.experimental.tcp_max_read_buffer_size", 65_536),
    # Two servers must not share a port in silence.
    ("grpc.so_reuseport", 0),
    # A connection without a call is of no use: daemons keep Attach open, and whoever calls again connects again.
    ("grpc.max_connection_idle_ms", 120_000),
)

ENROLLMENT_OPTIONS: Final[Options] = (
    *(option for option in SERVER_OPTIONS if option[0] != "grpc.max_connection_idle_ms"),
    # Anybody may connect here, and needs a second.
    ("grpc.max_connection_idle_ms", 10_000),
    ("grpc.max_connection_age_ms", 60_000),
    ("grpc.max_connection_age_grace_ms", 10_000),
    ("grpc.max_concurrent_streams", 4),
)
"""Of the port that asks for no certificate."""


def with_keepalive(options: Options, seconds: float) -> Options:
    """Return ``options`` with a ping after every ``seconds`` of silence; in as many more it must be answered."""
    milliseconds = round(seconds * 1000)
    changed = {
        "grpc.keepalive_time_ms": milliseconds,
        "grpc.keepalive_timeout_ms": milliseconds // 3,
        "grpc.http2.ping_timeout_ms": milliseconds,
        "grpc.http2.min_ping_interval_without_data_ms": milliseconds * 2 // 3,
    }
    return tuple((name, changed.get(name, value)) for name, value in options)


class Context(Protocol):
    """The part of a servicer context, sync or aio, that says who calls."""

    def auth_context(self) -> Mapping[str, Any]:
        """Return the properties of the connection's TLS session."""


@dataclass(frozen=True, slots=True)
class Identity:
    """Who is at the other end of a call, by its certificate."""

    member: Member
    serial: str
    """Lower-case hexadecimal without padding, as ``Certificate.serial_hex``."""
    not_after: datetime
    key_exchange_group: str = ""
    """E.g. X25519MLKEM768; empty when gRPC does not say."""

    @property
    def federation(self) -> str:
        """The member's federation."""
        return self.member.federation

    @property
    def role(self) -> Role:
        """The member's role."""
        return self.member.role

    @property
    def name(self) -> str:
        """The member's name."""
        return self.member.name


def peer_identity(context: Context, federation: str | None = None) -> Identity:
    """Return who calls, from the certificate of the connection and nothing else.

    Args:
        context: Of the call.
        federation: When given, the only one that is accepted.

    Raises:
        FsllmError: IDENTITY_MISSING: no client certificate, or one that names no member. CERTIFICATE_UNTRUSTED: another
            federation's.

    """
    properties = context.auth_context()
    pem = next(iter(properties.get("x509_pem_cert", ())), None)
    if not pem:
        raise FsllmError("IDENTITY_MISSING", "The connection carries no client certificate")
    certificate = Certificate.parse(pem)
    if certificate.uri is None:
        raise FsllmError("IDENTITY_MISSING", "The client certificate names no member")
    member = Member.parse(certificate.uri)
    if federation is not None and member.federation != federation:
        raise FsllmError(
            "CERTIFICATE_UNTRUSTED", f"The certificate is of federation {member.federation!r}, not {federation!r}"
        )
    group = next(iter(properties.get("ssl_negotiated_key_exchange_group", ())), b"")
    return Identity(member, certificate.serial_hex, certificate.not_after, group.decode(errors="replace"))


def channel_credentials(credential: Credential) -> grpc.ChannelCredentials:
    """Return what a member's channel uses. After a renewal make a new channel: gRPC can not rotate this end."""
    return grpc.ssl_channel_credentials(credential.authority, credential.key, credential.chain)


def enrollment_channel_credentials(authority_pem: bytes) -> grpc.ChannelCredentials:
    """Return what a newcomer's channel uses: it knows the authority, and has no certificate yet."""
    return grpc.ssl_channel_credentials(authority_pem)


def server_credentials(provider: Callable[[], Credential], *, require_client: bool = True) -> grpc.ServerCredentials:
    """Return what a server port uses; each new connection gets the credential that ``provider`` returns then.

    Args:
        provider: Called from gRPC's threads at each handshake, so it must be quick and thread-safe (return an
        attribute). require_client: False for the enrolment port, where a client's certificate would be ignored anyway.

    """
    lock = threading.Lock()
    current = provider()

    def configuration(credential: Credential) -> grpc.ServerCertificateConfiguration:
        pairs = [(credential.key, credential.chain)]
        return grpc.ssl_server_certificate_configuration(pairs, credential.authority if require_client else None)

    def fetch() -> grpc.ServerCertificateConfiguration | None:
        nonlocal current
        with lock:
            latest = provider()
            if latest is current:
                return None
            current = latest
            return configuration(latest)

    # None from fetch means unchanged, which the stub does not know.
    return grpc.dynamic_ssl_server_credentials(configuration(current), fetch, require_client)  # type: ignore[arg-type]
