"""The runs and their logs, in the database."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import Connection, insert, select

from fsllm_server.store.database import Database
from fsllm_server.store.schema import events, runs


@dataclass(frozen=True, slots=True)
class RunRecord:
    """A run as it was submitted."""

    id: str
    name: str
    request_id: str
    plan: str
    """Canonical JSON."""
    created: float


@dataclass(frozen=True, slots=True)
class Entry:
    """One event of a run's log."""

    sequence: int
    at: float
    kind: str
    body: str
    """JSON, see engine/events.py."""
    manifest: str | None = None
    """The digest of the manifest of the round that this event has committed, if it has; hexadecimal."""


class EventLog:
    """Append and replay. What ``append`` has returned from survives the loss of power."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def submit(self, run: RunRecord, first: Entry) -> None:
        """Record a run and its first event, together."""

        def work(connection: Connection) -> None:
            connection.execute(
                insert(runs).values(
                    id=run.id, name=run.name, request_id=run.request_id, plan=run.plan, created=run.created
                )
            )
            _insert(connection, run.id, first)

        await self._database.write(work)

    async def append(self, run_id: str, entry: Entry) -> None:
        """Record the next event of a run.

        Raises:
            FsllmError: DISK_FULL, STATE_CORRUPT.

        """
        await self._database.write(lambda connection: _insert(connection, run_id, entry))

    async def runs(self) -> list[RunRecord]:
        """Return all runs, oldest first."""
        query = select(runs).order_by(runs.c.created, runs.c.id)
        rows = await self._database.read(lambda connection: connection.execute(query).all())
        return [RunRecord(row.id, row.name, row.request_id, row.plan, row.created) for row in rows]

    async def replay(self, run_id: str) -> list[Entry]:
        """Return a run's log."""
        query = select(events).where(events.c.run_id == run_id).order_by(events.c.sequence)
        rows = await self._database.read(lambda connection: connection.execute(query).all())
        return [Entry(row.sequence, row.at, row.kind, row.body, row.manifest) for row in rows]


def _insert(connection: Connection, run_id: str, entry: Entry) -> None:
    connection.execute(
        insert(events).values(
            run_id=run_id,
            sequence=entry.sequence,
            at=entry.at,
            kind=entry.kind,
            body=entry.body,
            manifest=entry.manifest,
        )
    )
