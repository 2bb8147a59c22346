"""Following a run: a live display at a terminal, lines elsewhere, JSON for programs; and how it ended."""

import json
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Final

import click
from rich.console import Console
from rich.live import Live

from fsllm.v1.control_pb2 import RUN_STATUS_PAUSED, Run, WatchRunResponse
from fsllm_common.errors import FsllmError
from fsllm_operator.as_json import event_object
from fsllm_operator.connection import Connection
from fsllm_operator.console import stdout
from fsllm_operator.display import run_display
from fsllm_operator.watching import Watched, line

_PROGRESS_SECONDS: Final = 10.0
"""Between two lines about one member's progress where lines are printed."""

_ENDINGS: Final = {
    "cancelled": ("RUN_CANCELLED", "was cancelled"),
    "paused": ("RUN_PAUSED", "is paused"),
}


def follow(connection: Connection, run: Run, *, as_json: bool = False, console: Console | None = None) -> None:
    """Show a run until it ends or is paused.

    Raises:
        FsllmError: RUN_CANCELLED, RUN_PAUSED: how it ended, when it is not done.

    """
    console = console or stdout()
    watched = Watched.of(run)
    show, screen = _shower(watched, console, as_json=as_json)

    def lost(error: FsllmError) -> None:
        watched.message = f"{error.message}; waiting for it"
        click.echo(watched.message, err=True)

    try:
        with connection.interruptible(), screen:
            for event in connection.watch(run.run_id, lost=lost):
                if not watched.apply(event):
                    continue
                show(event)
                # What the log says of the past is no news: ask whether it is paused now.
                if event.kind == "status" and event.subject == "paused":
                    now = connection.run(run.run_id)
                    if now.status == RUN_STATUS_PAUSED:
                        break
            watched.refresh(connection.run(run.run_id))
            if isinstance(screen, Live):
                screen.update(run_display(watched))
    except KeyboardInterrupt:
        click.echo(f"\nThe run goes on. `fsllm run watch {run.run_id}` shows it again.", err=True)
        raise
    _end(watched, quiet=as_json)


def _shower(
    watched: Watched, console: Console, *, as_json: bool
) -> tuple[Callable[[WatchRunResponse], None], AbstractContextManager[object]]:
    """Return what shows an event, and the context in which it does."""
    if as_json:
        return lambda event: click.echo(json.dumps(event_object(event))), nullcontext()
    if console.is_terminal:
        live = Live(run_display(watched), console=console, refresh_per_second=4)
        return lambda _: live.update(run_display(watched)), live
    return Lines(click.echo).show, nullcontext()


class Lines:
    """Prints events as lines, but not every step of every member."""

    def __init__(self, write: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._write = write
        self._clock = clock
        self._last: dict[str, tuple[str, float]] = {}

    def show(self, event: WatchRunResponse) -> None:
        """Print an event; progress only when the activity changed, ended, or some seconds have passed."""
        if event.HasField("progress"):
            activity, at = self._last.get(event.subject, ("", 0.0))
            progress, now = event.progress, self._clock()
            ended = progress.total > 0 and progress.done >= progress.total
            if progress.activity == activity and not ended and now - at < _PROGRESS_SECONDS:
                return
            self._last[event.subject] = (progress.activity, now)
        self._write(line(event))


def _end(watched: Watched, *, quiet: bool) -> None:
    if watched.status in _ENDINGS:
        reason, happened = _ENDINGS[watched.status]
        because = f": {watched.message}" if watched.message else ""
        raise FsllmError(reason, f"Run {watched.name} ({watched.run_id}) {happened}{because}")
    if not quiet:
        click.echo(f"Run {watched.name} is done: {len([n for n in watched.committed if n])} rounds.")
        click.echo(f"  fsllm run export {watched.run_id} -o DIR")
