"""A study as a picture: the objective trial by trial, round by round, and against the values that were tried."""

import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from fsllm_common.files import write_atomic
from fsllm_operator.tune.search import DONE, FAILED, PRUNED, Trial, best
from fsllm_operator.tune.space import Space, value_text
from fsllm_operator.tune.study import Choices
from fsllm_operator.tune.table import plot_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_BEST: Final = "#2a9d5c"
_OTHER: Final = "#9aa5b1"
_PRUNED: Final = "#e0a030"


def write_plot(space: Space, trials: Sequence[Trial]) -> None:
    """Write the plot beside the study; the same trials give the same bytes.

    Raises:
        Unavailable: DISK_FULL.

    """
    import matplotlib

    picture = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": space.study.name, "svg.fonttype": "none"}):
        draw(space, trials).savefig(picture, format="svg", metadata={"Date": None})
    write_atomic(plot_file(space.file), picture.getvalue())


def draw(space: Space, trials: Sequence[Trial]) -> "Figure":
    """Return the three pictures side by side."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(13.0, 9.5 + 1.3 * len(space.study.space)), 4.4), layout="constrained")
    over_trials, over_rounds, over_values = figure.subplots(1, 3)
    measured = [trial for trial in trials if trial.objective is not None and math.isfinite(trial.objective)]
    _trials(over_trials, space, measured)
    _rounds(over_rounds, space, measured)
    _values(over_values, space, measured)
    figure.suptitle(f"study {space.study.name}: {len(trials)} trials")
    return figure


def so_far(space: Space, trials: Sequence[Trial]) -> list[tuple[int, float]]:
    """Return (trial, the best objective of those done up to it) from the first that is done on."""
    line = []
    for at, trial in enumerate(trials):
        found = best(list(trials[: at + 1]), space.study)
        if found is not None and found.objective is not None:
            line.append((trial.number, found.objective))
    return line


def _trials(axes: "Axes", space: Space, trials: Sequence[Trial]) -> None:
    from matplotlib.ticker import MaxNLocator

    for state, colour, marker in ((DONE, _BEST, "o"), (PRUNED, _PRUNED, "x"), (FAILED, _OTHER, "s")):
        these = [(trial.number, trial.objective) for trial in trials if trial.state == state]
        if these:
            axes.scatter(*zip(*these, strict=True), color=colour, marker=marker, label=state)
    if line := so_far(space, trials):
        axes.step(*zip(*line, strict=True), where="post", color=_BEST, linewidth=1, label="best so far")
    axes.set_xlabel("trial")
    axes.set_ylabel(_name(space))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if trials:
        axes.legend(fontsize=8)


def _rounds(axes: "Axes", space: Space, trials: Sequence[Trial]) -> None:
    from matplotlib.ticker import MaxNLocator

    found = best(list(trials), space.study)
    for trial in trials:
        is_best = found is not None and trial.number == found.number
        axes.plot(
            list(trial.curve),
            list(trial.curve.values()),
            color=_BEST if is_best else _PRUNED if trial.state == PRUNED else _OTHER,
            linewidth=2 if is_best else 1,
            zorder=3 if is_best else 2,
            marker=".",
        )
    for rung in space.rungs():
        axes.axvline(rung, color=_OTHER, linewidth=0.6, linestyle=":")
    axes.set_xlabel("round")
    axes.set_ylabel(_name(space))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _values(axes: "Axes", space: Space, trials: Sequence[Trial]) -> None:
    """Draw parallel coordinates: an axis a key, a line a trial, the darker the better."""
    import matplotlib

    keys = list(space.study.space)
    sign = 1 if space.study.objective.direction == "minimize" else -1
    # Trials that ended early behind those that are done: what they had after fewer rounds does not compare.
    worst_first = sorted(trials, key=lambda trial: (trial.state == DONE, -sign * (trial.objective or 0.0)))
    colours = matplotlib.colormaps["viridis_r"]
    for rank, trial in enumerate(worst_first):
        heights = [height(space, key, trial) for key in keys]
        colour = colours(rank / max(1, len(worst_first) - 1))
        # A single key has no line to draw: it runs to the right.
        axes.plot(range(len(keys)) if len(keys) > 1 else (0, 1), heights * (2 if len(keys) == 1 else 1), color=colour)
    for at, key in enumerate(keys):
        axes.axvline(at, color=_OTHER, linewidth=0.8)
        for level, words in marks(space, key):
            aside = {0.0: (0, -3, "top"), 1.0: (0, 3, "bottom")}.get(level, (3, 0, "center"))
            axes.annotate(
                words,
                (at, level),
                aside[:2],
                textcoords="offset points",
                ha="left" if aside[0] else "center",
                va=aside[2],
                fontsize=8,
            )
    axes.set_xticks(range(len(keys)), [key.replace(".", ".\n", 1) for key in keys])
    axes.tick_params(axis="x", length=0, pad=16, labelsize=8)
    axes.set_yticks([])
    axes.set_ylim(-0.02, 1.02)
    for side in ("top", "right", "bottom", "left"):
        axes.spines[side].set_visible(False)
    axes.set_title("values tried, the darker the better", fontsize=9, pad=16)


def height(space: Space, key: str, trial: Trial) -> float:
    """Return where a trial's value lies on its axis, from 0 to 1."""
    dimension, value = space.study.space[key], trial.values[key]
    if isinstance(dimension, Choices):
        return dimension.choices.index(value) / (len(dimension.choices) - 1)
    if not isinstance(value, int | float):
        raise TypeError(f"{key}: {value!r} is no number")
    scale = math.log if dimension.log else float
    return (scale(value) - scale(dimension.low)) / (scale(dimension.high) - scale(dimension.low))


def marks(space: Space, key: str) -> list[tuple[float, str]]:
    """Return what stands at a key's axis, and how high: a range's ends, every choice."""
    dimension = space.study.space[key]
    if isinstance(dimension, Choices):
        last = len(dimension.choices) - 1
        return [(at / last, value_text(choice)) for at, choice in enumerate(dimension.choices)]
    return [(0.0, value_text(dimension.low)), (1.0, value_text(dimension.high))]


def _name(space: Space) -> str:
    scope, metric = space.study.objective.key
    return f"{scope} {metric.replace('_', ' ')}"
