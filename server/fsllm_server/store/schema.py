"""The tables of the server's records.

Portable SQL only: SQLite by default, PostgreSQL by URL. Times are seconds since the epoch, in UTC. A change here needs
a migration in ``migrations/versions`` and its name at the end of ``REVISIONS``; a test compares the two.
"""

from typing import Final

from sqlalchemy import (
    Boolean,
    Column,
    Double,
    ForeignKey,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
)

REVISIONS: Final = ("0001", "0002")
"""Every schema revision this version of fsllm knows, oldest first; the last is the one it works with."""

metadata: Final = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_name)s",
        "uq": "uq_%(table_name)s_%(column_0_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "pk": "pk_%(table_name)s",
    }
)

runs: Final = Table(
    "runs",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("name", String(63), nullable=False),
    # Made by the caller of SubmitRun; what makes a retry find the first run.
    Column("request_id", String(128), nullable=False),
    # Canonical JSON.
    Column("plan", Text, nullable=False),
    Column("created", Double, nullable=False),
    UniqueConstraint("request_id"),
)

events: Final = Table(
    "events",
    metadata,
    Column("run_id", String(32), ForeignKey("runs.id"), primary_key=True),
    # 1, 2, 3, ... in each run.
    Column("sequence", Integer, primary_key=True, autoincrement=False),
    Column("at", Double, nullable=False),
    Column("kind", String(32), nullable=False),
    # JSON, see engine/events.py.
    Column("body", Text, nullable=False),
    # The digest of the manifest of the round that the event has committed; hexadecimal.
    Column("manifest", String(64)),
)

members: Final = Table(
    "members",
    metadata,
    Column("name", String(63), primary_key=True),
    Column("role", String(16), nullable=False),
    # enrolled or revoked; an open invitation stands in `invites`.
    Column("standing", String(16), nullable=False),
    # Of the current certificate.
    Column("serial", String(64), nullable=False),
    Column("not_after", Double, nullable=False),
    Column("public_key", LargeBinary),
    Column("enrolled_at", Double, nullable=False),
    Column("revoked_at", Double),
)

certificates: Final = Table(
    "certificates",
    metadata,
    # Hexadecimal, lower case.
    Column("serial", String(64), primary_key=True),
    Column("member", String(63), nullable=False, index=True),
    Column("not_after", Double, nullable=False),
    Column("revoked", Boolean, nullable=False, default=False),
)

invites: Final = Table(
    "invites",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("name", String(63), nullable=False, index=True),
    Column("role", String(16), nullable=False),
    Column("secret_hash", LargeBinary, nullable=False),
    Column("expires", Double, nullable=False),
    Column("used_at", Double),
    # Of the key that redeemed it: the same key may redeem again, so that a lost answer is a safe retry.
    Column("public_key_hash", LargeBinary),
    # The PEM chain that key was given.
    Column("certificate", LargeBinary),
)
