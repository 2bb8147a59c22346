"""The state folder, the database and its migrations."""

import sqlite3
from pathlib import Path

import pytest
from sqlalchemy import insert, select, text
from sqlalchemy.exc import IntegrityError

from fsllm_common.errors import Exit, FsllmError, SettingsInvalid
from fsllm_server.store.database import Database
from fsllm_server.store.events import Entry, EventLog, RunRecord
from fsllm_server.store.folder import StateFolder
from fsllm_server.store.schema import REVISIONS, invites, metadata, runs


def url(folder: Path) -> str:
    return f"sqlite:///{folder / 'fsllm.sqlite3'}"


def test_a_state_folder_belongs_to_one_process(tmp_path: Path) -> None:
    folder = StateFolder(tmp_path / "deep" / "state")
    assert (folder.root.stat().st_mode & 0o777) == 0o700
    with pytest.raises(FsllmError) as error:
        StateFolder(folder.root)
    assert error.value.reason == "STATE_LOCKED"
    assert str(folder.root) in error.value.message
    folder.close()
    StateFolder(folder.root).close()


def test_a_state_folder_that_can_not_be_made_is_a_wrong_setting(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SettingsInvalid, match="file"):
        StateFolder(tmp_path / "file" / "state")


@pytest.mark.slow
def test_the_migrations_make_what_the_schema_says(tmp_path: Path) -> None:
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext

    database = Database(url(tmp_path))
    with database.engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True, "compare_server_default": True})
        assert compare_metadata(context, metadata) == []
        assert context.get_current_revision() == REVISIONS[-1]
    database.close()


@pytest.mark.slow
def test_what_is_written_is_durable_and_checked(tmp_path: Path) -> None:
    database = Database(url(tmp_path))
    with database.engine.connect() as connection:
        pragmas = {
            name: connection.scalar(text(f"PRAGMA {name}")) for name in ("journal_mode", "synchronous", "foreign_keys")
        }
    assert pragmas == {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1}
    values = {"id": "1", "name": "a", "role": "site", "secret_hash": b"h", "expires": 1.0}
    database.transact(lambda c: c.execute(insert(invites).values(values)))
    with pytest.raises(IntegrityError):
        database.transact(lambda c: c.execute(insert(invites).values(values)))
    database.close()
    again = Database(url(tmp_path))
    assert again.transact(lambda c: c.scalar(select(invites.c.name))) == "a"
    again.close()


@pytest.mark.slow
async def test_a_log_is_kept_in_order_and_whole(tmp_path: Path) -> None:
    database = Database(url(tmp_path))
    log = EventLog(database)
    record = RunRecord("r", "name", "request", "{}", 1.5)
    first = Entry(1, 1.5, "submitted", "{}")
    await log.submit(record, first)
    entries = [first, *(Entry(i, float(i), "paused", f'{{"n":{i}}}') for i in range(2, 6))]
    for entry in reversed(entries[1:]):
        await log.append("r", entry)
    assert await log.replay("r") == entries
    assert await log.runs() == [record]
    # The same place twice, an unknown run, the same request: each is refused, and nothing of it stays.
    with pytest.raises(IntegrityError):
        await log.append("r", entries[2])
    with pytest.raises(IntegrityError):
        await log.append("nobody", first)
    with pytest.raises(IntegrityError):
        await log.submit(RunRecord("r2", "name", "request", "{}", 2.0), first)
    assert await log.replay("r") == entries
    assert await log.runs() == [record]
    database.close()


@pytest.mark.slow
def test_a_schema_of_the_future_is_left_alone(tmp_path: Path) -> None:
    Database(url(tmp_path)).close()
    with sqlite3.connect(tmp_path / "fsllm.sqlite3") as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    connection.close()
    with pytest.raises(FsllmError) as error:
        Database(url(tmp_path))
    assert error.value.reason == "STATE_NEWER"
    assert "9999" in error.value.message


def test_a_file_that_is_no_database_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "fsllm.sqlite3"
    path.write_bytes(b"not a database at all" * 100)
    with pytest.raises(FsllmError) as error:
        Database(url(tmp_path))
    assert error.value.reason == "STATE_CORRUPT"
    assert str(path) in error.value.message
    assert path.read_bytes() == b"not a database at all" * 100


@pytest.mark.parametrize("wrong", ["nonsense", "nosuch://x", "oracle+nodriver://x"])
def test_a_url_that_is_none_is_a_wrong_setting(wrong: str) -> None:
    with pytest.raises(SettingsInvalid, match="database"):
        Database(wrong)


@pytest.mark.slow
def test_a_full_disk_says_so(tmp_path: Path) -> None:
    database = Database(url(tmp_path))

    def fill(connection: object) -> None:
        database_connection = connection
        database_connection.exec_driver_sql("PRAGMA max_page_count = 1")  # type: ignore[attr-defined]
        for i in range(50):
            row = {"id": str(i), "name": "n" * 60, "request_id": str(i), "plan": "x" * 10_000, "created": 1.0}
            database_connection.execute(insert(runs).values(row))  # type: ignore[attr-defined]

    with pytest.raises(FsllmError) as error:
        database.transact(fill)
    assert error.value.reason == "DISK_FULL"
    assert str(tmp_path) in error.value.message
    database.close()


def test_a_database_that_can_not_be_opened_says_so(tmp_path: Path) -> None:
    with pytest.raises(FsllmError) as error:
        Database(url(tmp_path / "missing"))
    assert (error.value.reason, error.value.exit_code) == ("STATE_CORRUPT", Exit.STORAGE)
    assert "missing" in error.value.message
