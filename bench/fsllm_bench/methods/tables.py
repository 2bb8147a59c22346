"""The tables, made of nothing but the file of results."""

import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib.metadata import version
from typing import Final

from fsllm_bench.methods.attacks import ATTACKS, NONE
from fsllm_bench.methods.plans import ATTACK_SPLIT, ATTACKED, BASE, METHODS, Cell
from fsllm_bench.methods.runs import Measured, Score
from fsllm_bench.methods.splits import ROWS, SITES
from fsllm_bench.report import markdown

Found = Mapping[Cell, Measured]

COLUMNS: Final = (
    "method",
    "seeds",
    "held-out loss",
    "exact match",
    "the sites' own loss",
    "own exact match",
    "KiB up",
    "KiB down",
    "server's peak, MiB",
    "s of training",
)
NOT_RUN: Final = "not run"
_NOBODY: Final = "-"
_PACKAGES: Final = ("torch", "deepspeed", "peft", "transformers")
_MARGIN: Final = 0.01
"""A loss that fell by less than this part of it is told of."""


def page(found: Found, seeds: Sequence[int], splits: Sequence[str], methods: Iterable[str] = METHODS) -> str:
    """Return the section: a table a split, the robust ones under attack, and what went wrong."""
    methods = list(methods)
    texts = [_setting()]
    for split in splits:
        texts += [f"### {_TITLES[split]}", *_split(found, split, seeds, methods)]
    texts += ["### One of five sites lies", _ATTACKS, attacked(found, seeds), distances(found, seeds)]
    if wrong := list(_wrong(found)):
        texts.append("Runs that went wrong:\n\n" + "\n".join(wrong))
    return "\n\n".join(text for text in texts if text)


_TITLES: Final = {"skewed": "Skewed: each site has its own tasks", "iid": "Iid: the same rows, dealt out"}

_ATTACKS: Final = (
    f"The {ATTACK_SPLIT} split; the same methods with an honest fifth site, and with one whose updates "
    "are sign-flipped and ten times as long, its own times 50, or normal noise ten times as long. It is a real daemon; "
    "its updates are changed before they are encoded, and `wire.max_update_norm` is unset. Loss of the four honest "
    "sites, on rows of their own that nobody trains on; in brackets how far above the clean run it is. Of several "
    "seeds: the means, and the farthest above. bulyan has seven sites, of which one lies: it needs 4 f + 3."
)


def _setting() -> str:
    train = BASE["train"]
    packages = ", ".join(f"{name} {version(name)}" for name in _PACKAGES)
    return (
        f"Real daemons: {len(SITES)} sites of {ROWS} rows (seven for bulyan), one server, mTLS on loopback, the "
        f"embedded model ({packages}). {BASE['rounds']} rounds of {train['steps']} steps of {train['batch_size']} "
        f"packed sequences, LoRA of rank {BASE['adapter']['rank']}, float32 on the wire; what a method needs besides "
        "stands in `bench/fsllm_bench/methods/plans.py`. Loss: of the base model -> after the last round, on "
        f"{BASE['evaluate']['limit']} rows that nobody trains on: the examiner's (held-out, all tasks), and each "
        "site's own, which is all there is to measure where every site has a model of its own, or where evaluators "
        "train (fltrust). dpo's loss is its own, and its match is the share of pairs in the right order. KiB up and "
        "down: of a site, in a round. The server's peak is of a process that goes on from run to run, with what "
        "earlier ones have left in it. Seconds: of a site, in a round, while the others train on the same cores. "
        "Of several seeds: the mean, and the range in brackets."
    )


def _split(found: Found, split: str, seeds: Sequence[int], methods: Sequence[str]) -> Iterator[str]:
    """Yield the table of what has ended, and which methods have no run that has."""
    done = {
        name: [result for seed in seeds if (result := found.get(Cell(name, split, seed))) and not result.failure]
        for name in methods
    }
    if rows := [_row(name, results) for name, results in done.items() if results]:
        yield markdown(COLUMNS, rows)
    if missing := [name for name, results in done.items() if not results]:
        yield f"{NOT_RUN.capitalize()}, or not to the end: {', '.join(missing)}."


def _row(name: str, done: Sequence[Measured]) -> list[str]:
    cells = [name, ", ".join(str(result.seed) for result in done)]
    for pick in (_held_out, _own):
        scores = [score for score in map(pick, done) if score is not None]
        before = statistics.mean(score.before for score in scores) if scores else 0.0
        matches = [100 * score.matches for score in scores if score.matches is not None]
        after = f"{before:.2f} -> {spread([score.after for score in scores], '.3f')}" if scores else _NOBODY
        cells += [after, f"{spread(matches, '.0f')} %" if matches else _NOBODY]
    picks: tuple[tuple[Callable[[Measured], float], str], ...] = (
        (lambda result: result.up / 1024, ".1f"),
        (lambda result: result.down / 1024, ".1f"),
        (lambda result: result.peak_mebibytes, ".0f"),
        (lambda result: result.train_seconds, ".1f"),
    )
    return cells + [format(statistics.mean(map(value, done)), shape) for value, shape in picks]


def _held_out(result: Measured) -> Score | None:
    return result.held_out


def _own(result: Measured) -> Score | None:
    return result.own


def spread(values: Sequence[float], shape: str) -> str:
    """Return the mean, and the range where there is one."""
    mean = format(statistics.mean(values), shape)
    low, high = format(min(values), shape), format(max(values), shape)
    return mean if len(values) == 1 else f"{mean} ({low} to {high})"


def attacked(found: Found, seeds: Sequence[int]) -> str:
    """Return the table of the attacks."""
    rows = []
    for method in ATTACKED:
        clean = [loss for seed in seeds if (loss := _honest(found, method, seed, NONE)) is not None]
        row = [method, spread(clean, ".3f") if clean else NOT_RUN]
        for attack in ATTACKS:
            losses = [loss for seed in seeds if (loss := _honest(found, method, seed, attack)) is not None]
            text = f"{statistics.mean(losses):.3f}" if losses else NOT_RUN
            if above := _above(found, method, seeds, attack):
                most = f", at most {max(above):+.3f}" if len(above) > 1 else ""
                text += f" ({statistics.mean(above):+.3f}{most})"
            row.append(text)
        rows.append(row)
    return markdown(("method", "clean", *ATTACKS), rows)


def distances(found: Found, seeds: Sequence[int]) -> str:
    """Return how far from their clean runs the rules end, and how far FedAvg does."""
    far = {
        method: max(loss for above in measured for loss in above)
        for method in ATTACKED
        if all(measured := [_above(found, method, seeds, attack) for attack in ATTACKS])
    }
    robust = {method: distance for method, distance in far.items() if method not in _PLAIN}
    if not robust:
        return ""
    worst = max(robust, key=lambda method: robust[method])
    plain = ", ".join(f"{method} {far[method]:.3f}" for method in _PLAIN if method in far)
    all_of_them = len(robust) == len(ATTACKED) - len(_PLAIN)
    among = "every robust rule" if all_of_them else f"of the robust rules, so far: {', '.join(robust)}"
    text = f"Under every attack within {robust[worst]:.3f} ({worst}) of its clean run: {among}."
    return f"{text} Without one the worst attack costs {plain}." if plain else text


_PLAIN: Final = ("fedavg", "ffa-lora")


def _above(found: Found, method: str, seeds: Sequence[int], attack: str) -> list[float]:
    """Return how far above the clean run the attacked one ended, of each seed that has both."""
    pairs = [(_honest(found, method, seed, attack), _honest(found, method, seed, NONE)) for seed in seeds]
    return [loss - clean for loss, clean in pairs if loss is not None and clean is not None]


def _honest(found: Found, method: str, seed: int, attack: str) -> float | None:
    result = found.get(Cell(method, ATTACK_SPLIT, seed, attack))
    return result.honest.after if result is not None and result.honest is not None else None


def _wrong(found: Found) -> Iterator[str]:
    for cell, result in found.items():
        if result.failure:
            yield f"- `{cell.name}` did not end: {result.failure}"
        for whose, score in (("the held-out", result.held_out), ("the sites' own", result.own)):
            if cell.attack == NONE and score is not None and score.after > (1 - _MARGIN) * score.before:
                yield f"- `{cell.name}`: {whose} loss did not fall ({score.before:.3f} -> {score.after:.3f})"
