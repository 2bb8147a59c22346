"""The database: SQLAlchemy Core over SQLite (a file in the state folder) or PostgreSQL (by URL).

SQLite runs in WAL mode with synchronous=FULL, so that a committed transaction survives the loss of power. All writes go
through one thread: SQLite has one writer anyway, and a queue in front of it is kinder than SQLITE_BUSY.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from sqlalchemy import URL, Connection, create_engine, event, inspect, make_url, text
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError, SQLAlchemyError
from sqlalchemy.pool import ConnectionPoolEntry

from fsllm_common.errors import FsllmError, SettingsInvalid, Unavailable
from fsllm_common.failpoints import reach
from fsllm_server.store.schema import REVISIONS

T = TypeVar("T")

URL_VARIABLE = "FSLLM_MIGRATE_URL"
"""How the migrating child learns the URL: by environment, for a URL may hold a password and arguments are public."""


class Database:
    """The server's records. Open for as long as the server runs."""

    def __init__(self, url: str) -> None:
        """Connect, and bring the schema to the newest revision.

        Args:
            url: An SQLAlchemy URL, e.g. ``sqlite:////var/lib/fsllm/fsllm.sqlite3`` or ``postgresql+psycopg://...``.

        Raises:
            SettingsInvalid: The URL is none, or its driver is not installed.
            FsllmError: STATE_NEWER, STATE_CORRUPT, or DISK_FULL.

        """
        try:
            self._url = make_url(url)
            self.engine = create_engine(self._url, pool_pre_ping=self._url.get_backend_name() != "sqlite")
        except (SQLAlchemyError, ImportError) as error:
            raise SettingsInvalid(f"database: {error}") from error
        if self._url.get_backend_name() == "sqlite":
            event.listen(self.engine, "connect", _configure_sqlite)
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="database")
        try:
            self._upgrade()
        except BaseException:
            self.close()
            raise

    def transact(self, work: Callable[[Connection], T]) -> T:
        """Run ``work`` in one transaction on the writing thread and wait for it. For start-up and tests.

        Raises:
            FsllmError: DISK_FULL, STATE_CORRUPT.

        """
        return self._writer.submit(self._commit, work).result()

    async def write(self, work: Callable[[Connection], T]) -> T:
        """Run ``work`` in one transaction on the writing thread; it is durable when this returns.

        Raises:
            FsllmError: DISK_FULL, STATE_CORRUPT.

        """
        return await asyncio.get_running_loop().run_in_executor(self._writer, self._commit, work)

    async def read(self, work: Callable[[Connection], T]) -> T:
        """Run ``work``, which only reads, on some other thread."""
        return await asyncio.to_thread(self._transact, work)

    def close(self) -> None:
        """Finish what is queued and close every connection."""
        self._writer.shutdown()
        self.engine.dispose()

    def _commit(self, work: Callable[[Connection], T]) -> T:
        def last(connection: Connection) -> T:
            result = work(connection)
            reach("database.commit")
            return result

        result = self._transact(last)
        reach("database.committed")
        return result

    def _transact(self, work: Callable[[Connection], T]) -> T:
        try:
            with self.engine.begin() as connection:
                return work(connection)
        except DBAPIError as error:
            raise self._explained(error) from error

    def _explained(self, error: DBAPIError) -> Exception:
        """Return our error for one of the database's, or the error itself when it is a caller's own (a constraint)."""
        where = _shown(self._url)
        said = str(error.orig)
        if "disk is full" in said or "No space left" in said:
            return Unavailable("DISK_FULL", f"no space left for the database {where}", retry_after=5)
        if "malformed" in said or "not a database" in said or "disk I/O error" in said:
            return FsllmError("STATE_CORRUPT", f"database {where}: {said}")
        if isinstance(error, OperationalError | InterfaceError):
            return Unavailable(
                "STATE_CORRUPT", f"database {where}: {said}", cure="Check that the database is up and may be written."
            )
        return error

    def _upgrade(self) -> None:
        revision = self.transact(_revision)
        if revision == REVISIONS[-1]:
            return
        if revision is not None and revision not in REVISIONS:
            raise FsllmError(
                "STATE_NEWER", f"database {_shown(self._url)} has schema {revision}, newer than {REVISIONS[-1]}"
            )
        # In a child, because Alembic would stay in the daemon's memory for ever after.
        child = subprocess.run(
            [sys.executable, "-m", "fsllm_server.store.migrations"],
            env={**os.environ, URL_VARIABLE: self._url.render_as_string(hide_password=False)},
            capture_output=True,
            text=True,
            check=False,
        )
        if child.returncode != 0:
            last = child.stderr.strip().splitlines()[-1:] or ["no message"]
            raise FsllmError("STATE_CORRUPT", f"database {_shown(self._url)}: the schema was not upgraded: {last[0]}")


def _shown(url: URL) -> str:
    return url.database or "" if url.get_backend_name() == "sqlite" else url.render_as_string(hide_password=True)


def _configure_sqlite(connection: Any, _: ConnectionPoolEntry) -> None:  # noqa: ANN401 - a DB-API connection
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "busy_timeout=10000"):
        connection.execute(f"PRAGMA {pragma}")


def _revision(connection: Connection) -> str | None:
    if not inspect(connection).has_table("alembic_version"):
        return None
    revision: str | None = connection.scalar(text("SELECT version_num FROM alembic_version"))
    return revision
