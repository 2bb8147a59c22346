"""Who holds what in the demo: three sites, the pool of all their rows, and a held-out file that nobody trains on."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from fsllm_bench.embedded import tasks
from fsllm_common.errors import DataInvalid

SITES = tasks.SITES
POOLED = "pooled"
"""The daemon that holds all sites' rows in one place: only a comparison, impossible where data may not move."""

HELD_OUT_FRACTION = 0.1
HELD_OUT_LIMIT = 200


@dataclass(frozen=True)
class Files:
    """The data files, one each."""

    sites: dict[str, Path]
    pooled: Path
    held_out: Path


def embedded(folder: Path, seed: int) -> Files:
    """Write the embedded tasks' rows for every site."""
    written = tasks.write_federation(folder, seed)
    return Files(dict(written.train), _pool(folder, list(written.train.values())), written.heldout)


def divide(source: Path, folder: Path, seed: int, split_by: str | None) -> Files:
    """Divide a user's jsonl among the sites, after putting a held-out part aside.

    With ``split_by`` rows with the same value of that field stay together (the sites differ in kind); otherwise the
    rows are dealt at random.

    Raises:
        DataInvalid: The file is missing, holds a line that is not a JSON object, or too few rows or values to divide.

    """
    try:
        lines = source.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise DataInvalid(f"{source}: {error.strerror}") from None
    rows = [(line, _value(source, number, line, split_by)) for number, line in enumerate(lines, 1) if line.strip()]
    if len(rows) < 10 * len(SITES):
        raise DataInvalid(f"{source}: {len(rows)} rows are too few to divide among {len(SITES)} sites")
    rng = Random(seed)  # noqa: S311  # a deal of cards, not a secret
    rng.shuffle(rows)
    aside = min(HELD_OUT_LIMIT, int(len(rows) * HELD_OUT_FRACTION))
    held_out, rest = rows[:aside], rows[aside:]
    shares = _by_value(source, rest) if split_by else [rest[start :: len(SITES)] for start in range(len(SITES))]
    folder.mkdir(parents=True, exist_ok=True)
    sites = {
        site: _write(folder / f"{site}.jsonl", [line for line, _ in share])
        for site, share in zip(SITES, shares, strict=True)
    }
    return Files(
        sites,
        _pool(folder, list(sites.values())),
        _write(folder / "heldout.jsonl", [line for line, _ in held_out]),
    )


def _value(source: Path, number: int, line: str, field: str | None) -> str:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataInvalid(f"{source}, line {number}: not JSON ({error.msg} at column {error.colno})") from None
    if not isinstance(row, dict):
        raise DataInvalid(f"{source}, line {number}: not a JSON object")
    if field is not None and field not in row:
        raise DataInvalid(f"{source}, line {number}: has no field {field!r} to split by")
    return str(row[field]) if field else ""


def _by_value(source: Path, rows: Sequence[tuple[str, str]]) -> list[list[tuple[str, str]]]:
    groups: dict[str, list[tuple[str, str]]] = {}
    for row in rows:
        groups.setdefault(row[1], []).append(row)
    if len(groups) < len(SITES):
        raise DataInvalid(f"{source}: {len(groups)} different values can not be divided among {len(SITES)} sites")
    shares: list[list[tuple[str, str]]] = [[] for _ in SITES]
    for group in sorted(groups.values(), key=len, reverse=True):
        min(shares, key=len).extend(group)
    return shares


def _pool(folder: Path, files: Sequence[Path]) -> Path:
    return _write(folder / f"{POOLED}.jsonl", [line for file in files for line in file.read_text().splitlines()])


def _write(path: Path, lines: Sequence[str]) -> Path:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path
