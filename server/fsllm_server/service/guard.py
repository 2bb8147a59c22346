"""Before every call on the main port: who is it, may it, and is it still welcome.

Identity is the client certificate's URI and nothing else. A call of a member that is revoked, or whose certificate
ends, is ended at once, live streams too: TLS itself looks at a certificate only when a connection begins.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final

from fsllm.v1 import control_pb2, federation_pb2
from fsllm_common.errors import FsllmError, Refused, Unavailable
from fsllm_common.identity.credentials import Identity, peer_identity
from fsllm_common.identity.names import Member, Role
from fsllm_common.telemetry.logs import bind
from fsllm_common.telemetry.metrics import ServerMetrics
from fsllm_server.service.boundary import Boundary, Context
from fsllm_server.service.rates import CallRate
from fsllm_server.store.members import Members

_EVERYONE: Final = frozenset(Role)
_FEDERATION: Final = federation_pb2.DESCRIPTOR.services_by_name["FederationService"].full_name
_CONTROL: Final = control_pb2.DESCRIPTOR.services_by_name["ControlService"]

ROLES: Final[dict[str, frozenset[Role]]] = {
    f"/{_FEDERATION}/Attach": frozenset({Role.SITE, Role.EVALUATOR}),
    f"/{_FEDERATION}/Download": frozenset({Role.SITE, Role.EVALUATOR}),
    f"/{_FEDERATION}/Upload": frozenset({Role.SITE, Role.EVALUATOR}),
    f"/{_FEDERATION}/UploadStatus": frozenset({Role.SITE, Role.EVALUATOR}),
    f"/{_FEDERATION}/Renew": _EVERYONE,
    **{f"/{_CONTROL.full_name}/{method.name}": frozenset({Role.OPERATOR}) for method in _CONTROL.methods},
    "/grpc.health.v1.Health/Check": _EVERYONE,
    "/grpc.health.v1.Health/Watch": _EVERYONE,
}
"""Who may call what on the main port. What is not here is refused."""


@dataclass(eq=False, slots=True)
class Call:
    """A call in progress, and what ended it when the server did."""

    peer: Identity
    task: asyncio.Task[Any]
    ended_by: FsllmError | None = field(default=None)

    def end(self, error: FsllmError) -> None:
        """End the call with ``error``, wherever it waits. The first error counts."""
        if self.ended_by is None:
            self.ended_by = error
            self.task.cancel()


_this: ContextVar[Call] = ContextVar("call")


def this_call() -> Call:
    """Return the call that is being served; the guard sets it before any servicer runs."""
    return _this.get()


def caller() -> Member:
    """Return who makes the call that is being served."""
    return _this.get().peer.member


class Calls:
    """Every call in progress on the main port."""

    def __init__(self, limit: int, per_member: int | None = None) -> None:
        self._limit = limit
        self._per_member = per_member if per_member is not None else limit
        self._live: set[Call] = set()
        self._of: Counter[str] = Counter()

    @contextmanager
    def entered(self, peer: Identity, context: Context | None = None) -> Iterator[Call]:
        """Hold the current task's call until it ends, and end it when its certificate does.

        It counts as its member's until gRPC has let go of ``context``: the status of a call whose caller does not read
        waits behind what is unread, and so does the memory of both.

        Raises:
            FsllmError: BUSY: there are too many. QUOTA_EXCEEDED: of this member. Or what the call was ended with.

        """
        if self._of[peer.name] >= self._per_member:
            message = f"{peer.name} has {self._per_member} calls in progress (--calls-per-member)"
            raise Unavailable("QUOTA_EXCEEDED", message, retry_after=2.0)
        if len(self._live) >= self._limit:
            raise Unavailable("BUSY", f"The server has {self._limit} calls in progress", retry_after=2.0)
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 - a servicer always runs in a task
        call = Call(peer, task)
        seconds = (peer.not_after - datetime.now(UTC)).total_seconds()
        expiry = asyncio.get_running_loop().call_later(seconds, lambda: call.end(_expired(peer)))
        self._live.add(call)
        self._of[peer.name] += 1
        try:
            yield call
        except asyncio.CancelledError:
            if call.ended_by is None:
                raise
            task.uncancel()
            raise call.ended_by from None
        finally:
            expiry.cancel()
            self._live.discard(call)
            if context is None:
                self._leave(peer.name)
            else:
                # The stub's class of callbacks is meant as a protocol.
                context.add_done_callback(lambda _: self._leave(peer.name))  # type: ignore[arg-type]

    def _leave(self, member: str) -> None:
        self._of[member] -= 1
        if not self._of[member]:
            del self._of[member]

    def end_member(self, name: str, error: FsllmError) -> None:
        """End every call of one member but the current one (an operator may revoke itself)."""
        self._end((call for call in self._live if call.peer.name == name), error)

    def end_all(self, error: FsllmError) -> None:
        """End every call."""
        self._end(self._live, error)

    def _end(self, calls: Iterable[Call], error: FsllmError) -> None:
        current = asyncio.current_task()
        for call in tuple(calls):
            if call.task is not current:
                call.end(error)


class Guard(Boundary):
    """The interceptor of the main port."""

    def __init__(self, federation: str, members: Members, calls: Calls, rate: CallRate, metrics: ServerMetrics) -> None:
        super().__init__(metrics)
        self._federation = federation
        self._members = members
        self._calls = calls
        self._rate = rate

    @contextmanager
    def entered(self, method: str, context: Context) -> Iterator[None]:
        """Let the caller in, or not."""
        peer = self.admit(method, context)
        self._rate.enter(peer.name, method)
        try:
            with self._calls.entered(peer, context) as call:
                # Not undone: each call is a task with a context of its own, which ends with it.
                _this.set(call)
                bind(member=peer.name)
                yield
        except FsllmError:
            self._rate.refused(peer.name)
            raise

    def admit(self, method: str, context: Context) -> Identity:
        """Return who calls, or say why not.

        Raises:
            FsllmError: IDENTITY_MISSING, CERTIFICATE_UNTRUSTED, CERTIFICATE_EXPIRED, MEMBER_REVOKED, NOT_ENROLLED,
                ROLE_FORBIDDEN.

        """
        peer = peer_identity(context, self._federation)
        if peer.not_after <= datetime.now(UTC):
            raise _expired(peer)
        self._members.check(peer.member, peer.serial)
        allowed = ROLES.get(method, frozenset())
        if peer.role not in allowed:
            roles = ", ".join(sorted(allowed)) or "nobody"
            message = f"{peer.name} is of role {peer.role}; {method.rpartition('/')[2]} is for {roles}"
            raise Refused("ROLE_FORBIDDEN", message)
        return peer


def _expired(peer: Identity) -> FsllmError:
    return Refused(
        "CERTIFICATE_EXPIRED", f"The certificate of {peer.name} ended at {peer.not_after:%Y-%m-%d %H:%M} UTC"
    )
