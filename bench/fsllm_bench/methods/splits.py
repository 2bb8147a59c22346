"""Who holds which rows: the same rows dealt out (iid), or each site's own tasks (skewed)."""

import itertools
import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Final

from fsllm_bench.embedded.tasks import Row, make_federation

SITES: Final = ("hospital-a", "hospital-b", "hospital-c", "hospital-d", "hospital-e")
MORE_SITES: Final = ("hospital-f", "hospital-g")
"""For methods that need seven; they are dealt rows like the first two's."""
SPLITS: Final = ("skewed", "iid")
ROWS: Final = 180
"""Training rows a site."""

_OTHER_DRAW: Final = 1000


@dataclass(frozen=True, slots=True)
class Files:
    """The data files."""

    sites: dict[str, Path]
    held_out: Path
    """What nobody trains on."""
    root: Path
    """What the federation itself has chosen, for methods that compare updates with a trusted one."""


def write(folder: Path, split: str, seed: int) -> Files:
    """Write the rows of every member.

    Both splits deal the same rows: to the site whose own tasks they are of, or to anyone. Each row is also a
    preference: its answer is chosen, and another row's of the same task is rejected.
    """
    folder.mkdir(parents=True, exist_ok=True)
    federation = make_federation(seed, sites=SITES, rows_per_site=ROWS)
    more = make_federation(seed + _OTHER_DRAW, sites=SITES, rows_per_site=ROWS)
    dealt: dict[str, Sequence[Row]] = {}
    for names, train in ((SITES, federation.train), (MORE_SITES, more.train)):
        shares = [train[site] for site in SITES]
        if split == "iid":
            pool = list(itertools.chain.from_iterable(shares))
            Random(seed).shuffle(pool)  # noqa: S311  # a deal of cards, not a secret
            shares = [tuple(pool[at :: len(SITES)]) for at in range(len(SITES))]
        dealt |= dict(zip(names, shares, strict=False))
    return Files(
        {site: _write(folder / f"{site}.jsonl", rows) for site, rows in dealt.items()},
        _write(folder / "held-out.jsonl", federation.heldout),
        _write(folder / "root.jsonl", federation.validation),
    )


def _write(path: Path, rows: Iterable[Row]) -> Path:
    rows = list(rows)
    answers: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        if row["output"] not in answers[row["task"]]:
            answers[row["task"]].append(row["output"])
    lines = []
    for row in rows:
        known = answers[row["task"]]
        other = known[(known.index(row["output"]) + 1) % len(known)]
        pair = {"prompt": f"{row['instruction']} {row['input']}", "chosen": row["output"], "rejected": other}
        lines.append(json.dumps({**row, **pair}) + "\n")
    path.write_text("".join(lines), encoding="utf-8")
    return path
