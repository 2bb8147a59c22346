"""The certificates that the server makes by itself: its own, and one for the operator of its host; both kept fresh."""

import asyncio
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from fsllm_common.errors import FsllmError, SettingsInvalid
from fsllm_common.files import write_atomic
from fsllm_common.identity.authority import AUTHORITY_FILE, CertificateAuthority
from fsllm_common.identity.keys import Credential, make_key, make_request, save_credential
from fsllm_common.identity.names import Member, Role
from fsllm_common.telemetry.logs import get_logger
from fsllm_common.telemetry.metrics import ServerMetrics
from fsllm_server.settings import ServerSettings
from fsllm_server.store.members import Members

log = get_logger()

LOCAL_OPERATOR: Final = "local-operator"
"""The operator of the server's own host. Whoever may read the state folder is one."""

TRY_AGAIN: Final = 30.0
"""Seconds after a renewal that failed, for want of disk space, say."""

LOOK_AGAIN: Final = 600.0
"""Seconds. Sleeping to the hour of renewal in one go would miss it when the host is suspended or its clock is set."""


def open_authority(state: Path, federation: str | None, *, known: bool) -> tuple[CertificateAuthority, str, bool]:
    """Return the federation's authority and name, made by the first start, and whether this is the first.

    Args:
        state: The state folder.
        federation: The name that the settings say; None: whatever it has.
        known: The database knows members. A new authority would shut them all out.

    Raises:
        SettingsInvalid: The federation has another name than the setting says.
        FsllmError: STATE_CORRUPT: there are members, but not the authority that has signed for them.

    """
    path = state / "federation"
    for needed in (path, state / "authority" / AUTHORITY_FILE):
        if known and not needed.is_file():
            raise FsllmError("STATE_CORRUPT", f"{needed} is missing, and the members' certificates depend on it")
    name = path.read_text().strip() if path.exists() else federation or "fsllm"
    if federation is not None and federation != name:
        message = f"--federation: this state folder ({state}) is of the federation {name!r}, not {federation!r}"
        raise SettingsInvalid(message, cure="Leave the setting out, or choose another --state-dir.")
    first = not path.exists()
    authority = CertificateAuthority.open(state / "authority", name)
    write_atomic(path, f"{name}\n".encode(), mode=0o600)
    return authority, name, first


class Certificates:
    """Issues the server's certificate and the local operator's at start, and anew at two thirds of their life."""

    def __init__(
        self,
        state: Path,
        authority: CertificateAuthority,
        federation: str,
        settings: ServerSettings,
        members: Members,
        metrics: ServerMetrics,
    ) -> None:
        self._state = state
        self._authority = authority
        self._operator = Member(federation, Role.OPERATOR, LOCAL_OPERATOR)
        self._hosts = settings.certificate_hosts
        self._life = settings.certificate_life
        self._members = members
        self._expiry = metrics.certificate_expiry
        self._expiry.labels("authority").set(authority.certificate.not_valid_after_utc.timestamp())
        self.server = self._issue_server()

    async def issue_operator(self) -> None:
        """Put a new credential into STATE/operator; the ones before stay good until they end or are revoked."""
        key = make_key()
        chain = self._authority.issue(make_request(key), self._operator, self._life)
        credential = Credential(key, chain, self._authority.pem)
        await self._members.enroll(self._operator, credential.certificate)
        save_credential(self._state / "operator", credential)
        self._expiry.labels("operator").set(credential.certificate.not_after.timestamp())

    async def keep_fresh(self) -> None:
        """Renew both whenever two thirds of their life are over, without touching connections; never returns."""
        while True:
            remaining = (self.server.certificate.renew_at - datetime.now(UTC)).total_seconds()
            await asyncio.sleep(min(max(remaining, 1.0), LOOK_AGAIN))
            if remaining > LOOK_AGAIN:
                continue
            try:
                # The operator's first: it is due at the same time, and the server's sets the next time.
                await self.issue_operator()
                self.server = self._issue_server()
            except FsllmError as error:
                log.error("certificates not renewed; trying again", error=error.message, reason=error.reason)  # noqa: TRY400
                await asyncio.sleep(TRY_AGAIN)
                continue
            log.info("certificates renewed", until=f"{self.server.certificate.not_after:%Y-%m-%d %H:%M} UTC")

    def _issue_server(self) -> Credential:
        key = make_key()
        chain = self._authority.issue_server(make_request(key), self._hosts, self._life)
        credential = Credential(key, chain, self._authority.pem)
        save_credential(self._state / "server", credential)
        self._expiry.labels("server").set(credential.certificate.not_after.timestamp())
        return credential
