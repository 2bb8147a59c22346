"""Replaying a run's log, with an eye on what was recorded about the rounds that it commits."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from fsllm_common.errors import FsllmError
from fsllm_server.engine import core
from fsllm_server.engine.effects import Effect
from fsllm_server.engine.events import load
from fsllm_server.engine.manifests import committed
from fsllm_server.engine.state import Commit, Run
from fsllm_server.store.events import Entry


@dataclass(frozen=True, slots=True)
class Step:
    """One entry of a log, and what the core made of it."""

    entry: Entry
    run: Run
    """After it."""
    effects: list[Effect]
    commit: Commit | None
    """The round that it has committed, if it has."""

    @property
    def recorded(self) -> str:
        """The digest of the commit's manifest as it was recorded; empty when it was not."""
        return self.entry.manifest or ""


def replay(run_id: str, entries: Iterable[Entry]) -> Iterator[Step]:
    """Yield what each entry of a log gives.

    Raises:
        FsllmError: STATE_CORRUPT, naming the entry: it can not be read, makes no sense where it stands, or does not
            commit the round that it committed when it was recorded. STATE_NEWER: the run goes by decisions that this
            version of fsllm does not know.

    """
    run: Run | None = None
    for entry in entries:
        before = run
        try:
            run, effects = core.decide(before, load(entry.body))
        except Exception as error:
            # Whatever the core stumbles over: it did not when the entry was recorded.
            if isinstance(error, FsllmError):
                raise _unreadable(run_id, entry, error.message, error.reason) from error
            raise _unreadable(run_id, entry, f"it does not fit ({type(error).__name__})") from error
        commit = committed(before, run)
        if commit is None and entry.manifest is not None:
            raise _unreadable(run_id, entry, "it committed a round once, and no longer does")
        yield Step(entry, run, effects, commit)


def _unreadable(run_id: str, entry: Entry, what: str, reason: str = "STATE_CORRUPT") -> FsllmError:
    return FsllmError(reason, f"run {run_id}: entry {entry.sequence} of its log ({entry.kind}): {what}")
