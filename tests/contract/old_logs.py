"""Logs of runs, and what was decided at each entry: recorded once under each version of the decisions, kept for ever.

``python tests/contract/old_logs.py`` records those of the latest version, from runs of the simulation.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from fsllm_server.engine import core, effects, events
from fsllm_server.engine.state import Run, Version

FOLDER = Path(__file__).parent / "logs"
SEEDS = range(24)


class Entry(NamedTuple):
    """One entry of a log."""

    body: str
    told: str
    """A digest of what the core told the shell to do."""


def told(done: list[effects.Effect]) -> str:
    """Return a digest of what others see of a decision: sentences for people apart, which may be worded anew."""
    return hashlib.blake2b(json.dumps([_told(effect) for effect in done]).encode(), digest_size=6).hexdigest()


def _told(effect: effects.Effect) -> list[object]:
    match effect:
        case effects.SendOrder(order):
            return ["send", order.id, order.member, order.round, order.kind, _digest(order.base)]
        case effects.WithdrawOrder():
            return ["withdraw", effect.member, effect.order_id, effect.reason]
        case effects.SetTimer():
            return ["timer", effect.timer, effect.seconds]
        case effects.ClearTimer():
            return ["clear", effect.timer]
        case effects.Reduce():
            members = [[update.member, update.digest] for update in effect.updates]
            return ["reduce", effect.job, effect.round, _digest(effect.base), members]
        case effects.Notify():
            commit = effect.commit.manifest if effect.commit is not None else ""
            return ["notify", effect.round, effect.kind, effect.subject, commit]
        case effects.SweepSpools():
            return ["sweep"]


def _digest(version: Version | None) -> str:
    return version.digest if version is not None else ""


def decided(bodies: list[str]) -> Iterator[Entry]:
    """Yield what the core decides at each entry of a log."""
    run: Run | None = None
    for body in bodies:
        run, done = core.decide(run, events.load(body))
        yield Entry(body, told(done))


def read(path: Path) -> list[list[Entry]]:
    """Return the logs of a file."""
    with gzip.open(path, "rt") as file:
        return [[Entry(*entry) for entry in json.loads(line)] for line in file]


def record(path: Path) -> None:
    """Play seeds and write the logs of their runs."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "fault"))
    from simulation.run import play

    found = [list(decided(bodies)) for seed in SEEDS for bodies in play(seed, verbose=True).logs]
    lines = "".join(json.dumps(log, separators=(",", ":")) + "\n" for log in found)
    path.write_bytes(gzip.compress(lines.encode(), 9, mtime=0))


if __name__ == "__main__":
    from fsllm_server.engine.rules import LATEST

    record(FOLDER / f"rules-{LATEST}.jsonl.gz")
