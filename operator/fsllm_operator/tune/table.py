"""A study's trials for people and programs: the table, the objects of ``--json``, the best plan's file."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from fsllm_common.files import write_atomic
from fsllm_operator.rounds import number
from fsllm_operator.tune.search import DONE, FAILED, PRUNED, RUNNING, Trial, best
from fsllm_operator.tune.space import Space, value_text

COLOURS = {RUNNING: "cyan", DONE: "green", PRUNED: "yellow", FAILED: "red"}


def trials_table(space: Space, trials: Sequence[Trial]) -> Table:
    """Return the table of trials, the best marked."""
    found = best(list(trials), space.study)
    objective = space.study.objective
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("trial", justify="right")
    for key in space.study.space:
        table.add_column(key, justify="right")
    for heading in (" ".join((objective.key[0], objective.metric.replace("_", " "))), "rounds"):
        table.add_column(heading, justify="right")
    for heading in ("state", "run", ""):
        table.add_column(heading)
    for trial in trials:
        is_best = found is not None and trial.number == found.number
        table.add_row(
            str(trial.number),
            *(value_text(trial.values[key]) if key in trial.values else "-" for key in space.study.space),
            number(trial.objective),
            str(trial.rounds),
            Text(trial.state, style=COLOURS[trial.state]),
            trial.run_id,
            Text("best", style="bold green") if is_best else Text(trial.message, style="dim"),
            style="bold" if is_best else "",
        )
    return table


def trial_object(trial: Trial) -> dict[str, Any]:
    """Return a trial for ``--json``."""
    return {
        "trial": trial.number,
        "state": trial.state,
        "values": trial.values,
        "objective": trial.objective,
        "rounds": trial.rounds,
        "objectives": {str(round_): value for round_, value in trial.curve.items()},
        "run_id": trial.run_id or None,
        "message": trial.message,
    }


def study_object(space: Space, trials: Sequence[Trial]) -> dict[str, Any]:
    """Return a whole study for ``--json``."""
    found = best(list(trials), space.study)
    return {
        "study": space.study.name,
        "direction": space.study.objective.direction,
        "best": None if found is None else found.number,
        "best_plan": str(best_file(space.file)) if found is not None else None,
        "plot": str(plot_file(space.file)) if trials else None,
        "trials": [trial_object(trial) for trial in trials],
    }


def write_best(space: Space, trials: Sequence[Trial]) -> Trial | None:
    """Write the best trial's plan, as the base plan's file has it, and return that trial; nothing while none is done.

    Raises:
        Unavailable: DISK_FULL.

    """
    import yaml

    found = best(list(trials), space.study)
    if found is None:
        return None
    plan = space.contents(f"{space.study.name}-best", found.values)
    objective = space.study.objective
    head = (
        f"# The best of study {space.study.name}: trial {found.number}, run {found.run_id}, "
        f"{objective.key[0]} {objective.metric} {number(found.objective)} after round {found.rounds}.\n"
    )
    text = head + yaml.safe_dump(plan, sort_keys=False, allow_unicode=True)
    write_atomic(best_file(space.file), text.encode())
    return found


def best_file(study: Path) -> Path:
    """Return where the best plan is written: ``study-best.yaml`` beside ``study.yaml``."""
    return study.with_name(f"{study.stem}-best.yaml")


def plot_file(study: Path) -> Path:
    """Return where the plot is written: ``study.svg`` beside ``study.yaml``."""
    return study.with_suffix(".svg")
