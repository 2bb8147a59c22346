"""What an operator can see from here: the credential, the way to the server, certificates, clocks, disk, members."""

import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final, Literal

from fsllm.v1.control_pb2 import GetServerRequest, GetServerResponse, ListMembersRequest
from fsllm_common import __version__
from fsllm_common.errors import FsllmError
from fsllm_common.identity.authority import CLOCK_TOLERANCE
from fsllm_common.identity.keys import check_credential, load_credential
from fsllm_operator.connection import Connection
from fsllm_operator.credentials import Place, connect, discover
from fsllm_operator.rounds import size

_CLOCK_NOTICE: Final = timedelta(seconds=30)
_CERTIFICATE_NOTICE: Final = timedelta(hours=4)
"""A server renews a 24 h certificate with 8 h left; less than this means that it does not."""
_DISK_NOTICE: Final = 5 * 2**30
_DISK_LEAST: Final = 2**29


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at."""

    name: str
    outcome: Literal["ok", "warning", "failed"]
    message: str
    cure: str = ""
    reason: str = ""
    exit_code: int = 0

    def as_object(self) -> dict[str, Any]:
        """Return it for ``--json``."""
        return asdict(self)


def examine(server: str | None, credential: Path | None) -> list[Check]:
    """Look at everything in turn; what depends on something that failed is left out."""
    done: list[Check] = []
    try:
        place = discover(server, credential)
        done.append(_credential(place))
        done.append(_reachable(place))
        with connect(place) as connection:
            before = time.monotonic()
            answer = connection.call(connection.control.GetServer, GetServerRequest())
            delay = time.monotonic() - before
            done += describe_server(answer, datetime.now(UTC), timedelta(seconds=delay))
            done.append(_members(connection))
    except FsllmError as error:
        done.append(_failure(_next_name(done), error))
    return done


def describe_server(answer: GetServerResponse, now: datetime, delay: timedelta) -> list[Check]:
    """Return the checks on what the server says of itself.

    Args:
        answer: The server's.
        now: This host's clock when the answer came.
        delay: How long the answer took; the server's clock was read about half of it ago.

    """
    return [
        _version(answer),
        _clock(answer.now.ToDatetime(tzinfo=UTC) + delay / 2 - now),
        _server_certificate(answer.certificate_not_after.ToDatetime(tzinfo=UTC), answer.now.ToDatetime(tzinfo=UTC)),
        _disk(answer.disk_free_bytes),
        Check("key exchange", "ok", answer.key_exchange_group or "the server's gRPC does not say"),
    ]


def _credential(place: Place) -> Check:
    credential = load_credential(place.folder)
    check_credential(credential)
    certificate = credential.certificate
    message = f"{certificate.uri}, until {certificate.not_after:%Y-%m-%d %H:%M} UTC, in {place.folder}"
    return Check("credential", "ok", message)


def _reachable(place: Place) -> Check:
    begin = time.monotonic()
    if (obstacle := place.probe()) is not None:
        raise obstacle
    return Check("network", "ok", f"{place.server} answers in {(time.monotonic() - begin) * 1000:.0f} ms, over TLS")


def _version(answer: GetServerResponse) -> Check:
    message = f"federation {answer.federation}, fsllm {answer.software_version}"
    if answer.software_version == __version__:
        return Check("server", "ok", message)
    return Check("server", "warning", f"{message}; here it is {__version__}", "Install the server's version here.")


def _clock(ahead: timedelta) -> Check:
    seconds = ahead.total_seconds()
    message = f"the server's is {abs(seconds):.1f} s {'ahead' if seconds >= 0 else 'behind'}"
    if abs(ahead) <= _CLOCK_NOTICE:
        return Check("clock", "ok", message)
    cure = "Set both clocks by NTP: certificates begin and end by them."
    if abs(ahead) <= CLOCK_TOLERANCE:
        return Check("clock", "warning", message, cure)
    return _failure("clock", FsllmError("CERTIFICATE_EXPIRED", message, cure=cure))


def _server_certificate(until: datetime, now: datetime) -> Check:
    message = f"the server's ends {until:%Y-%m-%d %H:%M} UTC"
    if until - now >= _CERTIFICATE_NOTICE:
        return Check("certificate", "ok", message)
    return Check(
        "certificate", "warning", f"{message} and should have been renewed", "See the server's log, or restart it."
    )


def _disk(free: int) -> Check:
    message = f"{size(free)} free at the server"
    if free >= _DISK_NOTICE:
        return Check("disk", "ok", message)
    if free >= _DISK_LEAST:
        return Check(
            "disk", "warning", message, "Free space in the server's state folder before large adapters fill it."
        )
    return _failure("disk", FsllmError("DISK_FULL", message, cure="Free space in the server's state folder."))


def _members(connection: Connection) -> Check:
    members = connection.call(connection.control.ListMembers, ListMembersRequest()).members
    enrolled = [m for m in members if m.standing == "enrolled" and m.role != "operator"]
    away = sorted(m.name for m in enrolled if not m.attached)
    message = f"{len(enrolled) - len(away)} of {len(enrolled)} enrolled are attached"
    if not away:
        return Check("members", "ok", message)
    return Check(
        "members", "warning", f"{message}; away: {', '.join(away)}", "`fsllm-client doctor` at those sites says why."
    )


def _failure(name: str, error: FsllmError) -> Check:
    return Check(name, "failed", error.message, error.cure, error.reason, error.exit_code)


def _next_name(done: list[Check]) -> str:
    return ("credential", "network", "server")[min(len(done), 2)]
