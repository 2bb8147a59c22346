"""Play seeds: ``python tests/fault/simulation/run.py --seeds 2000``, or one again: ``--seed 17 --verbose``."""

import argparse
import asyncio
import gc
import shutil
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import get_args

sys.path.insert(0, str(Path(__file__).parents[1]))

from simulation import checker
from simulation.script import Arm, Rough
from simulation.seams import silenced, virtual
from simulation.world import World


@dataclass
class Outcome:
    """What came of a seed."""

    seed: int
    violations: list[checker.Violation]
    digest: str
    counts: Counter[str] = field(default_factory=Counter)
    history: list[str] = field(default_factory=list)
    logs: list[list[str]] = field(default_factory=list)
    """The runs' events, as they are recorded."""


@cache
def _warm_up() -> None:
    """Load what is imported at its first use: some of it draws random numbers, which would be the first seed's."""
    _play(0, verbose=False)


def play(seed: int, *, verbose: bool = False, rough: Rough = "", arms: Sequence[Arm] = ()) -> Outcome:
    """Play one seed, perhaps with more failpoints armed than its script has, and check it."""
    _warm_up()
    return _play(seed, verbose=verbose, rough=rough, arms=arms)


def _play(seed: int, *, verbose: bool, rough: Rough = "", arms: Sequence[Arm] = ()) -> Outcome:
    folder = Path(tempfile.mkdtemp(prefix="fsllm-simulation-", dir="/dev/shm"))
    hook = sys.unraisablehook
    try:
        world = World(seed, folder, verbose=verbose, rough=rough)
        world.script.arms += arms
        with virtual(world):
            found = checker.Checker(world)
            world.play()
            violations = found.check()
        outcome = Outcome(seed, violations, world.history.digest(), world.history.counts)
        if verbose or violations:
            outcome.history = list(map(str, world.history.events))
            outcome.logs = [[entry.body for entry in log] for log in world.records.logs.values()]
        # What never ended is thrown away: its 'finally' is of no more interest than a dead process's.
        sys.unraisablehook = lambda _: None
        # Some ask for a loop as they go, and asyncio would make one that nobody closes.
        asyncio.set_event_loop(None)
        with silenced(), warnings.catch_warnings(action="ignore"):
            world.close()
            del world, found
            gc.collect()
        return outcome
    finally:
        sys.unraisablehook = hook
        shutil.rmtree(folder, ignore_errors=True)


def play_all(seeds: list[int], processes: int, rough: Rough = "") -> Iterator[Outcome]:
    """Play many, on several cores."""
    one = partial(play, rough=rough)
    gc.collect()
    gc.freeze()
    if processes == 1:
        yield from map(one, seeds)
        return
    with ProcessPoolExecutor(processes) as pool:
        yield from pool.map(one, seeds, chunksize=8)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=2000, help="how many to play")
    parser.add_argument("--first", type=int, default=0, help="the first of them")
    parser.add_argument("--seed", type=int, help="play only this one")
    parser.add_argument("--rough", choices=get_args(Rough), default="", help="of what there is more")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--verbose", action="store_true", help="print the history, with what the code logs")
    parser.add_argument("--histories", action="store_true", help="print the hash of every seed's history")
    options = parser.parse_args()
    write = sys.stdout.write
    if options.seed is not None:
        outcome = play(options.seed, verbose=options.verbose, rough=options.rough)
        write("".join(f"{line}\n" for line in outcome.history if options.verbose))
        write("".join(f"seed {outcome.seed}: {violation}\n" for violation in outcome.violations))
        write(f"seed {outcome.seed}: history {outcome.digest}, {len(outcome.violations)} violations\n")
        return 1 if outcome.violations else 0
    began, broken, counts = time.perf_counter(), 0, Counter[str]()
    for outcome in play_all(
        list(range(options.first, options.first + options.seeds)), options.processes, options.rough
    ):
        counts += outcome.counts
        if options.histories:
            write(f"seed {outcome.seed}: history {outcome.digest}\n")
        if outcome.violations:
            broken += 1
            write(f"seed {outcome.seed}: {outcome.violations[0]}\n")
            sys.stdout.flush()
    if options.verbose:
        write("".join(f"{count:8} {what}\n" for what, count in sorted(counts.items())))
    seconds = time.perf_counter() - began
    write(f"{options.seeds} seeds in {seconds:.0f} s: {broken} broke a promise\n")
    if broken:
        write("Play one again with --seed N --verbose\n")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
