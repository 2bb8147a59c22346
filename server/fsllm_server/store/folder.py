"""The state folder: where everything lies, and the lock that keeps a second server out of it."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path
from typing import Final

from fsllm_common.errors import FsllmError, SettingsInvalid
from fsllm_server.store.layout import LAYOUT, refuse_unfinished

DATABASE: Final = "fsllm.sqlite3"
"""In the folder, unless the settings name another database."""

BLOBS: Final = "blobs"
"""In the folder: versions."""

SPOOLS: Final = "spools"
"""In the folder: uploads."""


class StateFolder:
    """A server's state folder, held under an exclusive lock until ``close``."""

    def __init__(self, root: Path) -> None:
        """Make the folder (0700) when it is missing, lock it, and bring it to this version's layout.

        Raises:
            FsllmError: STATE_LOCKED when another process holds it. STATE_NEWER, STATE_CORRUPT, DISK_FULL.
            SettingsInvalid: It can not be made or written.

        """
        self.root = root.absolute()
        try:
            self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = os.open(self.root / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise SettingsInvalid(f"state folder {self.root}: {error.strerror}") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._lock)
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise SettingsInvalid(f"state folder {self.root}: can not be locked: {error.strerror}") from error
            raise FsllmError("STATE_LOCKED", f"state folder {self.root} is in use by another process") from None
        try:
            refuse_unfinished(self.root)
            LAYOUT.migrate(self.root)
        except BaseException:
            self.close()
            raise

    @property
    def database_url(self) -> str:
        """The URL of the default database, a file in this folder."""
        return f"sqlite:///{self.root / DATABASE}"

    @property
    def blobs(self) -> Path:
        """Where versions lie."""
        return self.root / BLOBS

    @property
    def spools(self) -> Path:
        """Where uploads lie."""
        return self.root / SPOOLS

    def close(self) -> None:
        """Release the lock."""
        os.close(self._lock)
