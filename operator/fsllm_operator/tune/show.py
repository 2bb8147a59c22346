"""Who is told of a study under way: a live display at a terminal, lines elsewhere, JSON for programs."""

import json
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import click
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fsllm.v1.control_pb2 import WatchRunResponse
from fsllm_common.errors import FsllmError
from fsllm_operator.rounds import number
from fsllm_operator.tune.optimise import Audience
from fsllm_operator.tune.search import DONE, RUNNING, Search, Trial, best
from fsllm_operator.tune.space import told
from fsllm_operator.tune.table import trial_object, trials_table
from fsllm_operator.watching import Watched

_SHOWN_TRIALS = 20


def audience(search: Search, console: Console, *, as_json: bool) -> tuple["Audience", AbstractContextManager[object]]:
    """Return who is told, and the context in which it listens."""
    if as_json:
        return JsonLines(search), nullcontext()
    if console.is_terminal:
        live = Screen(search, console)
        return live, live.live
    return Lines(search), nullcontext()


class JsonLines:
    """One object a line."""

    def __init__(self, search: Search) -> None:
        self._objective = search.space.study.objective

    def began(self, trial: Trial, watched: Watched) -> None:
        """Tell of a trial under way."""
        _write({"kind": "trial", **trial_object(trial)})

    def happened(self, trial: int, event: WatchRunResponse) -> None:
        """Nothing: `fsllm run watch --json` tells a run's events."""

    def measured(self, trial: Trial, round_: int) -> None:
        """Tell a round's objective."""
        _write({"kind": "round", "trial": trial.number, "round": round_, "objective": trial.curve[round_]})

    def ended(self, trial: Trial) -> None:
        """Tell how a trial ended."""
        _write({"kind": "trial", **trial_object(trial)})

    def lost(self, error: FsllmError) -> None:
        """Tell on standard error that the server is waited for."""
        _waiting(error)


class Lines:
    """A line for what matters to the study."""

    def __init__(self, search: Search) -> None:
        self._search = search

    def began(self, trial: Trial, watched: Watched) -> None:
        """Tell a trial's values and run."""
        click.echo(f"Trial {trial.number}: {told(trial.values)}; run {trial.run_id}")

    def happened(self, trial: int, event: WatchRunResponse) -> None:
        """Tell failures, which may be the reason why nothing goes on."""
        if event.kind == "failure":
            click.echo(f"Trial {trial}, round {event.round}: {event.message}")

    def measured(self, trial: Trial, round_: int) -> None:
        """Tell a round's objective."""
        scope, metric = self._search.space.study.objective.key
        click.echo(f"Trial {trial.number}, round {round_}: {scope} {metric} {number(trial.curve[round_])}")

    def ended(self, trial: Trial) -> None:
        """Tell how a trial ended and what is the best so far."""
        because = f", {trial.message}" if trial.message else ""
        found = self._search.best()
        so_far = f"; the best so far is trial {found.number} with {number(found.objective)}" if found else ""
        click.echo(f"Trial {trial.number} is {trial.state}{because}{so_far}.")

    def lost(self, error: FsllmError) -> None:
        """Tell on standard error that the server is waited for."""
        _waiting(error)


class Screen:
    """The study on a terminal: its head, the last trials, the runs under way."""

    def __init__(self, search: Search, console: Console) -> None:
        self._search = search
        self._trials = search.trials()
        self._active: dict[int, Watched] = {}
        self._message = ""
        self.live = Live(self._display(), console=console, refresh_per_second=4)

    def began(self, trial: Trial, watched: Watched) -> None:
        """Show a trial's run."""
        self._active[trial.number] = watched
        self._recorded()

    def happened(self, trial: int, event: WatchRunResponse) -> None:
        """Show a run's progress."""
        self._message = ""
        self._update()

    def measured(self, trial: Trial, round_: int) -> None:
        """Show a round's objective."""
        self._recorded()

    def ended(self, trial: Trial) -> None:
        """Show how a trial ended."""
        self._active.pop(trial.number, None)
        self._recorded()

    def lost(self, error: FsllmError) -> None:
        """Show that the server is waited for."""
        self._message = f"{error.message}; waiting for it"
        self._update()

    def _recorded(self) -> None:
        self._trials = self._search.trials()
        self._update()

    def _update(self) -> None:
        self.live.update(self._display())

    def _display(self) -> RenderableType:
        space = self._search.space
        parts: list[RenderableType] = [self._head(), trials_table(space, self._trials[-_SHOWN_TRIALS:])]
        parts += [_run(trial, watched) for trial, watched in sorted(self._active.items())]
        if self._message:
            parts.append(Text(self._message, style="yellow"))
        return Group(*parts)

    def _head(self) -> Table:
        study = self._search.space.study
        ended = [trial for trial in self._trials if trial.state != RUNNING]
        found = best(self._trials, study)
        row = Table.grid(padding=(0, 2))
        row.add_row(
            Text(study.name, style="bold"),
            f"{len(ended)} of {study.trials} trials",
            ProgressBar(total=study.trials, completed=min(len(ended), study.trials), width=24),
            f"best: trial {found.number} with {number(found.objective)}" if found else "",
        )
        return row


def _run(trial: int, watched: Watched) -> Table:
    row = Table.grid(padding=(0, 2))
    members = [f"{m.name} {m.activity} {m.done}/{m.total}" for m in watched.members.values() if m.total]
    row.add_row(
        Text(f"trial {trial}", style="cyan"),
        f"round {watched.round} of {watched.rounds}" + (f", {watched.phase}" if watched.phase else ""),
        Text(", ".join(members) or watched.message, style="dim"),
    )
    return row


def ending(trials: list[Trial]) -> str:
    """Return how the trials of a study ended, in words."""
    counts = {state: sum(trial.state == state for trial in trials) for state in dict.fromkeys(t.state for t in trials)}
    return ", ".join(f"{count} {state}" for state, count in sorted(counts.items(), key=lambda c: (c[0] != DONE, c[0])))


def _write(told_: dict[str, Any]) -> None:
    click.echo(json.dumps(told_))


def _waiting(error: FsllmError) -> None:
    click.echo(f"{error.message}; waiting for it", err=True)
