"""Who belongs to the federation, and which of their certificates count.

Every call asks here, so the answers lie in memory; the tables are the truth and are written first.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Literal

from sqlalchemy import Connection, delete, insert, select, update

from fsllm_common.errors import FsllmError, Refused
from fsllm_common.identity.keys import Certificate
from fsllm_common.identity.names import Member, Role
from fsllm_server.store.database import Database
from fsllm_server.store.schema import certificates, members


@dataclass(frozen=True, slots=True)
class MemberRecord:
    """What the server keeps of one member."""

    name: str
    role: Role
    standing: Literal["enrolled", "revoked"]
    not_after: datetime
    """When its newest certificate ends."""


class Members:
    """The members' records, and the serials that are revoked."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._records: dict[str, MemberRecord] = {}
        self._revoked: set[str] = set()
        database.transact(self._load)

    def list(self) -> list[MemberRecord]:
        """Return every member, by name."""
        return [self._records[name] for name in sorted(self._records)]

    def get(self, name: str) -> MemberRecord | None:
        """Return one member's record."""
        return self._records.get(name)

    def check(self, member: Member, serial: str) -> None:
        """Check that a certificate's holder is welcome.

        Args:
            member: Whom the certificate names.
            serial: The certificate's, lower-case hexadecimal.

        Raises:
            Refused: MEMBER_REVOKED, or NOT_ENROLLED when the records (restored from a back-up, say) do not know it.

        """
        record = self._records.get(member.name)
        if record is None or record.role is not member.role:
            raise Refused("NOT_ENROLLED", f"This server has no {member.role} of the name {member.name}")
        if record.standing == "revoked" or serial in self._revoked:
            raise _revoked(member.name)

    async def enroll(self, member: Member, certificate: Certificate) -> None:
        """Record a member that the server itself admits (the operator of its own host), or its next certificate."""
        await self._database.write(lambda connection: record_enrollment(connection, member, certificate))
        self.enrolled(member, certificate)

    async def renew(self, member: Member, certificate: Certificate) -> None:
        """Record an enrolled member's next certificate; the one before stays good until it ends.

        Raises:
            Refused: MEMBER_REVOKED: it was revoked meanwhile.

        """
        await self._database.write(lambda connection: _record_renewal(connection, member, certificate))
        self._records[member.name] = replace(self._records[member.name], not_after=certificate.not_after)

    async def revoke(self, name: str) -> MemberRecord:
        """Revoke a member and every certificate it has. Revoking twice is as good as once.

        Raises:
            Refused: MEMBER_UNKNOWN.

        """
        record = self._records.get(name)
        if record is None:
            raise Refused("MEMBER_UNKNOWN", f"There is no member of the name {name[:80]!r}")
        serials = await self._database.write(lambda connection: _record_revocation(connection, name))
        self._revoked.update(serials)
        self._records[name] = revoked = replace(record, standing="revoked")
        return revoked

    def enrolled(self, member: Member, certificate: Certificate) -> None:
        """Take note of an enrolment that a committed transaction has recorded."""
        self._records[member.name] = MemberRecord(member.name, member.role, "enrolled", certificate.not_after)

    def _load(self, connection: Connection) -> None:
        for row in connection.execute(select(members)):
            not_after = datetime.fromtimestamp(row.not_after, UTC)
            self._records[row.name] = MemberRecord(row.name, Role(row.role), row.standing, not_after)
        self._revoked.update(connection.scalars(select(certificates.c.serial).where(certificates.c.revoked)))


def record_enrollment(connection: Connection, member: Member, certificate: Certificate) -> None:
    """Write a member as enrolled, in the place of a revoked one of the same name."""
    connection.execute(delete(members).where(members.c.name == member.name))
    connection.execute(
        insert(members).values(
            name=member.name,
            role=str(member.role),
            standing="enrolled",
            serial=certificate.serial_hex,
            not_after=certificate.not_after.timestamp(),
            enrolled_at=datetime.now(UTC).timestamp(),
        )
    )
    _record_certificate(connection, member, certificate)


def _record_renewal(connection: Connection, member: Member, certificate: Certificate) -> None:
    changed = connection.execute(
        update(members)
        .where(members.c.name == member.name, members.c.standing == "enrolled")
        .values(serial=certificate.serial_hex, not_after=certificate.not_after.timestamp())
    )
    if changed.rowcount != 1:
        raise _revoked(member.name)
    _record_certificate(connection, member, certificate)


def _record_certificate(connection: Connection, member: Member, certificate: Certificate) -> None:
    # An expired certificate is refused by its date: its row is of no more use, revoked or not.
    connection.execute(delete(certificates).where(certificates.c.not_after < datetime.now(UTC).timestamp()))
    connection.execute(
        insert(certificates).values(
            serial=certificate.serial_hex,
            member=member.name,
            not_after=certificate.not_after.timestamp(),
            revoked=False,
        )
    )


def _record_revocation(connection: Connection, name: str) -> list[str]:
    now = datetime.now(UTC).timestamp()
    connection.execute(update(members).where(members.c.name == name).values(standing="revoked", revoked_at=now))
    connection.execute(update(certificates).where(certificates.c.member == name).values(revoked=True))
    return list(connection.scalars(select(certificates.c.serial).where(certificates.c.member == name)))


def _revoked(name: str) -> FsllmError:
    return Refused("MEMBER_REVOKED", f"{name} has been revoked")
