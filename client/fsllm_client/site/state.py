"""The state folder of a site's daemon: where what lies, and the lock that keeps a second daemon out.

::

    STATE/                  0700; files 0600
        lock                held by the daemon; its process id
        layout              the version of all this, see ``fsllm_common.layout``: 1, with or without the file
        policy.toml         the site's policy, unless the setting names another file
        ledger.jsonl        the privacy ledger
        identity/           the key, the certificate, the federation's CA
        runs/RUN/           run.json (what is known of the run), private/ (optimizer and rule state)
        cache/              versions as downloaded, by digest
        outbox/             results that the server has not acknowledged yet
        trainer/            socket, logs and scratch files of the trainer
"""

import fcntl
import os
import stat
from pathlib import Path
from typing import Final, Self

from fsllm_common.errors import FsllmError, SettingsInvalid
from fsllm_common.files import disk_errors, make_folder
from fsllm_common.layout import Layout
from fsllm_common.telemetry.logs import get_logger

log = get_logger()

DIRECTORY_MODE: Final = 0o700
FILE_MODE: Final = 0o600

LAYOUT: Final = Layout(newest=1, steps={}, begun="runs")


def default_state_folder() -> Path:
    """Return $FSLLM_STATE_DIR, systemd's $STATE_DIRECTORY, or the user's own state folder."""
    if explicit := os.environ.get("FSLLM_STATE_DIR"):
        return Path(explicit)
    if given := os.environ.get("STATE_DIRECTORY"):
        return Path(given.split(":")[0])
    base = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(base) / "fsllm" / "client"


class StateFolder:
    """Paths in the state folder. Making one creates the folder, readable by its owner only."""

    def __init__(self, root: Path, *, make: bool = True) -> None:
        """Create what is missing.

        Args:
            root: The folder.
            make: False to look only: nothing is made or changed, and the folder may be missing.

        Raises:
            SettingsInvalid: The folder can not be made or written, or others can read the secrets in it.
            FsllmError: STATE_NEWER, STATE_CORRUPT.

        """
        self.root = root.expanduser().resolve()
        self._lock: int | None = None
        if make:
            self._make()

    @classmethod
    def existing(cls, root: Path) -> Self:
        """Return the folder that a daemon has made.

        Raises:
            SettingsInvalid: There is none.
            FsllmError: STATE_NEWER, STATE_CORRUPT.

        """
        state = cls(root, make=False)
        if not state.runs.is_dir():
            raise SettingsInvalid(
                f"{state.root} is not the state folder of a site",
                cure="Name the daemon's with --state-dir or FSLLM_STATE_DIR; the daemon makes it when it first starts.",
            )
        state.demand_known()
        return state

    def demand_known(self) -> None:
        """Refuse a folder that a newer fsllm has written.

        Raises:
            FsllmError: STATE_NEWER, STATE_CORRUPT.

        """
        LAYOUT.demand_known(LAYOUT.of(self.root), f"state folder {self.root}")

    def _make(self) -> None:
        try:
            with disk_errors(self.root):
                make_folder(self.root)
                if LAYOUT.of(self.root) is None:
                    LAYOUT.migrate(self.root)  # what begins now begins with the newest
                self.demand_known()
                _close_to_others(self.root, only_warn=True)
                for folder in (self.identity, self.runs, self.cache, self.outbox, self.trainer):
                    make_folder(folder)
                    _close_to_others(folder)
        except (PermissionError, NotADirectoryError, FileExistsError) as error:
            raise SettingsInvalid(
                f"The state folder {self.root} can not be used: {error.strerror}",
                cure="Choose another folder with --state-dir or FSLLM_STATE_DIR, or mend its owner.",
            ) from error

    @property
    def identity(self) -> Path:
        """Key, certificate, CA."""
        return self.root / "identity"

    @property
    def runs(self) -> Path:
        """One folder a run."""
        return self.root / "runs"

    @property
    def cache(self) -> Path:
        """Downloaded versions."""
        return self.root / "cache"

    @property
    def outbox(self) -> Path:
        """Results on their way."""
        return self.root / "outbox"

    @property
    def trainer(self) -> Path:
        """The trainer's socket, logs and scratch."""
        return self.root / "trainer"

    @property
    def policy(self) -> Path:
        """The default place of the policy."""
        return self.root / "policy.toml"

    @property
    def ledger(self) -> Path:
        """The privacy ledger."""
        return self.root / "ledger.jsonl"

    def private(self, run_id: str) -> Path:
        """Return the private folder of a run (optimizer, rule state), which the trainer fills."""
        return self.runs / run_id / "private"

    def lock(self) -> Self:
        """Take the folder for this process, until it ends, and bring it to this version's layout.

        Raises:
            FsllmError: STATE_LOCKED, with the other process's id. STATE_NEWER, STATE_CORRUPT, DISK_FULL.

        """
        descriptor = os.open(self.root / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, FILE_MODE)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(descriptor, 32, 0).decode(errors="replace").strip()
            os.close(descriptor)
            raise FsllmError("STATE_LOCKED", f"{self.root} is used by process {holder or 'unknown'}") from error
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        self._lock = descriptor
        try:
            LAYOUT.migrate(self.root)
        except BaseException:
            self.unlock()
            raise
        return self

    def unlock(self) -> None:
        """Let the folder go."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def daemon_pid(self) -> int | None:
        """Return the id of the daemon that holds the folder; None when no daemon runs."""
        try:
            descriptor = os.open(self.root / "lock", os.O_RDONLY)
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            text = os.pread(descriptor, 32, 0).decode(errors="replace").strip()
            return int(text) if text.isdigit() else None
        else:
            return None
        finally:
            os.close(descriptor)


def _close_to_others(folder: Path, *, only_warn: bool = False) -> None:
    """Take a folder's permissions from everyone but its owner.

    Args:
        folder: It exists.
        only_warn: Of a folder that is somebody else's, as a mounted volume may be: what lies in it is closed itself.

    Raises:
        PermissionError: It is open to others and not this user's.

    """
    if not stat.S_IMODE(folder.stat().st_mode) & 0o077:
        return
    try:
        folder.chmod(DIRECTORY_MODE)
    except PermissionError:
        if not only_warn or not os.access(folder, os.W_OK):
            raise
        log.warning("others may look into the state folder, which is not this user's", folder=str(folder))
