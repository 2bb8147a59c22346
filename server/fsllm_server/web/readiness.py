"""What must be true for the server to be ready: it serves, its database takes writes, its disk has room."""

import shutil
from pathlib import Path
from typing import Final

from sqlalchemy import false, update

from fsllm_common.errors import FsllmError
from fsllm_common.telemetry.web import Check
from fsllm_server.store.database import Database
from fsllm_server.store.schema import members

LEAST_FREE: Final = 256 * 2**20
"""Bytes on the state folder's disk."""


class Readiness:
    """The checks behind /readyz; they run in the web thread."""

    def __init__(self, database: Database, state: Path) -> None:
        self._database = database
        self._state = state
        self.serving = False
        """Set by the app while the ports answer."""

    def checks(self) -> tuple[Check, ...]:
        """Return the checks, the quickest first."""
        return self.check_ports, self.check_disk, self.check_database

    def check_ports(self) -> str | None:
        """Check that the gRPC ports answer."""
        return None if self.serving else "The gRPC ports do not answer: the server is starting or stopping."

    def check_disk(self) -> str | None:
        """Check that the disk has room."""
        free = shutil.disk_usage(self._state).free
        return None if free >= LEAST_FREE else f"The disk of {self._state} has {free >> 20} MiB left."

    def check_database(self) -> str | None:
        """Check that the database can be written, by taking the writer's place and changing nothing."""
        try:
            self._database.transact(
                lambda connection: connection.execute(update(members).where(false()).values(name=""))
            )
        except FsllmError as error:
            return error.message
        return None
