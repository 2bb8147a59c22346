"""Join tokens: one use each, kept as a hash, redeemed by one UPDATE.

A token is spent by its first key: the same key gets the same certificate again (its answer may have been lost), any
other is told that the token is used.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final

from sqlalchemy import Connection, Row, delete, insert, select, update

from fsllm_common.errors import Refused, SettingsInvalid
from fsllm_common.identity.join import make_token, token_identifier, token_matches
from fsllm_common.identity.keys import Certificate
from fsllm_common.identity.names import Member
from fsllm_server.store.database import Database
from fsllm_server.store.members import Members, record_enrollment
from fsllm_server.store.schema import invites

LONGEST: Final = timedelta(days=30)
"""A token that lies about longer than this is a risk without a use."""


@dataclass(frozen=True, slots=True)
class Invitation:
    """An open invitation."""

    member: Member
    expires: datetime


class Invites:
    """The invitations of one federation."""

    def __init__(self, database: Database, members: Members, federation: str) -> None:
        self._database = database
        self._members = members
        self._federation = federation

    async def invite(self, member: Member, life: timedelta) -> tuple[str, datetime]:
        """Make a token for a new member; an open one of the same name is void from now on.

        Returns:
            The token and when it expires. The token is nowhere else.

        Raises:
            Refused: MEMBER_EXISTS: a member of this name is enrolled.
            SettingsInvalid: The life is not within 30 days.

        """
        if not timedelta(0) < life <= LONGEST:
            raise SettingsInvalid(f"A join token lives up to {LONGEST.days} days, not {life}")
        record = self._members.get(member.name)
        if record is not None and record.standing == "enrolled":
            raise Refused("MEMBER_EXISTS", f"A {record.role} of the name {member.name} is enrolled")
        token = make_token()
        expires = datetime.now(UTC) + life

        def work(connection: Connection) -> None:
            _void(connection, member.name)
            connection.execute(
                insert(invites).values(
                    id=token.identifier,
                    name=member.name,
                    role=str(member.role),
                    secret_hash=token.secret_hash,
                    expires=expires.timestamp(),
                )
            )

        await self._database.write(work)
        return token.text, expires

    async def open(self) -> list[Invitation]:
        """Return the invitations that can still be redeemed, by name."""

        def work(connection: Connection) -> list[Invitation]:
            now = datetime.now(UTC).timestamp()
            rows = connection.execute(
                select(invites).where(invites.c.used_at.is_(None), invites.c.expires > now).order_by(invites.c.name)
            )
            return [Invitation(self._member(row), datetime.fromtimestamp(row.expires, UTC)) for row in rows]

        return await self._database.read(work)

    async def withdraw(self, name: str) -> bool:
        """Void the open invitation of ``name``; return whether there was one."""
        return await self._database.write(lambda connection: _void(connection, name))

    async def find(self, token: str, key: str) -> tuple[Member, bytes | None]:
        """Return whom a token invites, and the certificate chain it has given to ``key`` already, if it has.

        Args:
            token: "id.secret" as the newcomer presents it.
            key: The fingerprint of the newcomer's public key.

        Raises:
            Refused: JOIN_TOKEN_UNKNOWN, JOIN_TOKEN_USED, JOIN_TOKEN_EXPIRED.

        """
        identifier = token_identifier(token)
        row = await self._database.read(
            lambda connection: connection.execute(select(invites).where(invites.c.id == identifier)).one_or_none()
        )
        if row is None or not token_matches(token, row.secret_hash):
            raise Refused("JOIN_TOKEN_UNKNOWN", "This server has given out no such join token, or has withdrawn it")
        member = self._member(row)
        if row.used_at is not None and row.public_key_hash != key.encode():
            raise _used(member)
        if row.expires <= datetime.now(UTC).timestamp():
            when = f"{datetime.fromtimestamp(row.expires, UTC):%Y-%m-%d %H:%M} UTC"
            raise Refused("JOIN_TOKEN_EXPIRED", f"The join token of {member.name} expired at {when}")
        return member, row.certificate

    async def redeem(self, token: str, key: str, member: Member, chain: bytes) -> None:
        """Spend a token that ``find`` has accepted: the member is enrolled with ``chain`` when this returns.

        Raises:
            Refused: JOIN_TOKEN_USED: another call was faster.

        """
        certificate = Certificate.parse(chain)

        def work(connection: Connection) -> None:
            spent = connection.execute(
                update(invites)
                .where(invites.c.id == token_identifier(token), invites.c.used_at.is_(None))
                .values(used_at=datetime.now(UTC).timestamp(), public_key_hash=key.encode(), certificate=chain)
            )
            if spent.rowcount != 1:
                raise _used(member)
            record_enrollment(connection, member, certificate)

        await self._database.write(work)
        self._members.enrolled(member, certificate)

    def _member(self, row: Row[tuple[object, ...]]) -> Member:
        return Member.of(self._federation, row.role, row.name)


def _void(connection: Connection, name: str) -> bool:
    voided = connection.execute(delete(invites).where(invites.c.name == name, invites.c.used_at.is_(None)))
    return voided.rowcount > 0


def _used(member: Member) -> Refused:
    return Refused("JOIN_TOKEN_USED", f"The join token of {member.name} has been used")
