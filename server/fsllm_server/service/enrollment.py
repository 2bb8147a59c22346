"""The enrolment port: it does nothing but redeem join tokens."""

import ipaddress
from collections.abc import Callable
from datetime import timedelta
from urllib.parse import unquote

from fsllm.v1 import enrollment_pb2, enrollment_pb2_grpc
from fsllm_common.errors import FsllmError, Unavailable
from fsllm_common.identity.authority import CertificateAuthority
from fsllm_common.identity.keys import request_fingerprint
from fsllm_common.identity.names import Role
from fsllm_common.telemetry.logs import get_logger
from fsllm_common.telemetry.metrics import ServerMetrics
from fsllm_server.service.boundary import Context
from fsllm_server.service.rates import Rate
from fsllm_server.store.invites import Invites

log = get_logger()


class EnrollmentService(enrollment_pb2_grpc.EnrollmentServiceServicer):
    """Gives a newcomer its first certificate. The identity comes from the token's record."""

    def __init__(
        self,
        authority: CertificateAuthority,
        invites: Invites,
        life_of: Callable[[Role], timedelta],
        attempts_per_minute: int,
        metrics: ServerMetrics,
    ) -> None:
        self._authority = authority
        self._invites = invites
        self._life_of = life_of
        self._refused = Rate(attempts_per_minute / 60)
        self._metrics = metrics

    async def Redeem(  # noqa: N802 - the contract's
        self,
        request: enrollment_pb2.RedeemRequest,
        context: Context,
    ) -> enrollment_pb2.RedeemResponse:
        """Exchange a join token and a certificate signing request for a certificate."""
        address = _address(context.peer())
        if wait := self._refused.wait(address, 0):
            self._metrics.enrollments.labels("QUOTA_EXCEEDED").inc()
            message = "Too many join tokens from this address were refused (--join-attempts-per-minute)"
            raise Unavailable("QUOTA_EXCEEDED", message, retry_after=max(1.0, wait))
        try:
            chain = await self._redeem(request.token, request.csr)
        except FsllmError as error:
            self._refused.charge(address)
            self._metrics.enrollments.labels(error.reason).inc()
            log.warning("a join token was refused", reason=error.reason, error=error.message, peer=context.peer())
            raise
        self._metrics.enrollments.labels("OK").inc()
        return enrollment_pb2.RedeemResponse(certificate_chain=chain)

    async def _redeem(self, token: str, csr: bytes) -> bytes:
        key = request_fingerprint(csr)
        member, chain = await self._invites.find(token, key)
        if chain is None:
            chain = self._authority.issue(csr, member, self._life_of(member.role))
            await self._invites.redeem(token, key, member, chain)
            log.info("enrolled", member=member.name, role=str(member.role))
        return chain


def _address(peer: str) -> str:
    """Return what counts as one caller of gRPC's "ipv4:1.2.3.4:56" or "ipv6:[...]:56": an address, or a /64 network."""
    kind, _, rest = peer.partition(":")
    host = unquote(rest.rpartition(":")[0]).strip("[]")
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return kind
    if isinstance(address, ipaddress.IPv4Address):
        return str(address)
    return str(address.ipv4_mapped or ipaddress.ip_network((address, 64), strict=False))
