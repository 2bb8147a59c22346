"""Failpoints: the named instants around every sync, rename, commit and acknowledgement, where a test may strike.

A process whose environment names one, ``FSLLM_FAILPOINTS="blob.rename=kill@2,event.append=stop"``, kills (SIGKILL) or
stops (SIGSTOP) itself there, or has the disk fail (``eio``) or full (``enospc``), at the n-th time (the first unless
told). Tests in the same process listen instead. In every other process a failpoint costs one comparison.
"""

from __future__ import annotations

import errno
import os
import signal
from collections import Counter
from collections.abc import Callable
from typing import Final

from fsllm_common.errors import SettingsInvalid

VARIABLE: Final = "FSLLM_FAILPOINTS"

NAMES: Final = frozenset(
    {
        # Files that are replaced as a whole (files.replacing), and folders whose names are made durable.
        "file.sync",
        "file.rename",
        "file.renamed",
        "folder.sync",
        "folder.synced",
        # The server: an upload's payload, a version, an event of a run's log, what the site is told.
        "spool.sync",
        "spool.synced",
        "spool.drop",
        "spool.dropped",
        "blob.sync",
        "blob.synced",
        "blob.rename",
        "blob.renamed",
        "event.append",
        "event.appended",
        "receipt.send",
        "receipt.sent",
        # Every transaction of the server's database, and every answer to a call that is no stream.
        "database.commit",
        "database.committed",
        "answer.send",
        # The site: its ledger of privacy, and the receipt.
        "ledger.sync",
        "ledger.synced",
        "receipt.received",
        "parcel.removed",
    }
)
"""``x`` is reached just before it is done, its past just after."""

_SIGNALS: Final = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}
_ERRORS: Final = {"eio": errno.EIO, "enospc": errno.ENOSPC}


def parse(text: str) -> Callable[[str], None] | None:
    """Return what happens at the failpoints that ``text`` names; None for an empty text.

    Raises:
        SettingsInvalid: The text is none.

    """
    armed: dict[str, tuple[str, int]] = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        name, _, action = item.partition("=")
        action, _, count = action.partition("@")
        if name not in NAMES or action not in {*_SIGNALS, *_ERRORS} or not (count or "1").isdecimal():
            message = f"{VARIABLE}: {item!r} is not NAME=ACTION@COUNT with ACTION one of kill, stop, eio, enospc"
            raise SettingsInvalid(message, cure=f"Names: {', '.join(sorted(NAMES))}")
        armed[name] = action, int(count or "1")
    if not armed:
        return None
    reached: Counter[str] = Counter()

    def strike(name: str) -> None:
        reached[name] += 1
        action, count = armed.get(name, ("", 0))
        if reached[name] != count:
            return
        if action in _SIGNALS:
            os.kill(os.getpid(), _SIGNALS[action])
        else:
            raise OSError(_ERRORS[action], os.strerror(_ERRORS[action]))

    return strike


_listener: Callable[[str], None] | None = None


def arm() -> None:
    """Strike where this process's environment says; a command does this when it begins.

    Raises:
        SettingsInvalid: It says nothing that can be understood.

    """
    if (strike := parse(os.environ.get(VARIABLE, ""))) is not None:
        listen(strike)


def listen(listener: Callable[[str], None] | None) -> None:
    """Call ``listener`` with the name of each failpoint that is reached from now on, instead; None: nothing."""
    global _listener
    _listener = listener


def reach(name: str) -> None:
    """Note that the process is at the failpoint ``name``, one of ``NAMES``."""
    if _listener is not None:
        _listener(name)
