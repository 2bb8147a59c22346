"""Answer tokens a second, ours and the plain Trainer's: two resident processes that take turns, pass by pass."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final

from fsllm_bench.training import ours, plain
from fsllm_bench.training.setting import Setting
from fsllm_client.settings import extensions_folder
from fsllm_client.trainer.cpu_adam import default_folder
from fsllm_client.trainer.launch import environment, gpus
from fsllm_common.errors import TrainingFailed

ORDERS: Final = 3
"""Orders of the batches that each side trains in: how far losses differ by chance."""


@dataclass(frozen=True, slots=True)
class Side:
    """What one side did."""

    losses: list[list[float]]
    """On the held-out rows, before the first pass and after each: a list for every order of the batches."""
    seconds: list[float] = field(default_factory=list)
    """A pass, each order's first left out."""

    def speed(self, tokens: int) -> float:
        """Return the median over the passes of so many tokens a second."""
        return tokens / statistics.median(self.seconds)

    def last(self) -> list[float]:
        """Return the loss after the last pass in every order."""
        return [losses[-1] for losses in self.losses]


@dataclass(frozen=True, slots=True)
class Compared:
    """Both sides of one setting."""

    ours: Side
    plain: Side

    @property
    def ratio(self) -> float:
        """Our speed over the plain Trainer's."""
        return statistics.median(self.plain.seconds) / statistics.median(self.ours.seconds)

    @property
    def loss_difference(self) -> tuple[float, float]:
        """Our last loss less the plain Trainer's, over the latter, as means over the orders; and its standard error."""
        ours, plain = self.ours.last(), self.plain.last()
        error = (statistics.variance(ours) / len(ours) + statistics.variance(plain) / len(plain)) ** 0.5
        mean = statistics.mean(plain)
        return statistics.mean(ours) / mean - 1, error / mean


def compare(setting: Setting, *, threads: int, tell: Callable[[str], None]) -> Compared:
    """Let both train ``setting.passes`` passes, in turns, in each order. The first pass is the warm-up.

    Both begin with the same adapter and are measured by the same evaluation on the same held-out rows.

    Raises:
        TrainingFailed: WORKER_DIED.

    """
    extensions = extensions_folder(None) or default_folder()
    os.environ.update(environment(extensions=extensions, ranks=1, threads=threads, gpu=gpus() > 0))
    with _side("ours", ours.serve, setting) as us:
        version = _answer(us, "ours", setting)
        us.send(("loss", version))
        before = _answer(us, "ours", setting)
        sides = Compared(*(Side([[before] for _ in range(ORDERS)]) for _ in range(2)))

        def take_turn(name: str, side: Connection, found: Side, order: int, *, counts: bool) -> None:
            side.send(("train", order))
            seconds, adapter = _answer(side, name, setting)
            us.send(("loss", adapter))
            loss = _answer(us, "ours", setting)
            found.losses[order].append(loss)
            if counts:
                found.seconds.append(seconds)
            speed = setting.answer_tokens / seconds
            tell(f"{name}: {speed:.0f} answer tokens/s, loss {loss:.4f}{'' if counts else ' (not counted)'}")

        for order in range(ORDERS):
            # The Trainer trains to its end in one order: each takes a process of its own.
            with _side("plain", partial(plain.serve, order=order), setting) as them:
                them.send(version)
                for number in range(setting.passes):
                    take_turn("ours", us, sides.ours, order, counts=number > 0)
                    take_turn("plain", them, sides.plain, order, counts=number > 0)
        us.send(None)
    return sides


@contextlib.contextmanager
def _side(name: str, serve: Callable[[Setting, Connection], None], setting: Setting) -> Iterator[Connection]:
    # Spawned, not forked: an interpreter of its own, that reads the environment anew.
    context = multiprocessing.get_context("spawn")
    mine, theirs = context.Pipe()
    process = context.Process(target=_logged, args=(serve, setting, theirs, _log(setting, name)), daemon=True)
    process.start()
    theirs.close()
    try:
        yield mine
    finally:
        mine.close()
        process.join(10)
        process.kill()
        process.join()


def _log(setting: Setting, name: str) -> Path:
    return setting.folder / f"{name}.log"


def _logged(serve: Callable[[Setting, Connection], None], setting: Setting, turns: Connection, log: Path) -> None:
    with log.open("wb") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    serve(setting, turns)


def _answer(side: Connection, name: str, setting: Setting) -> Any:  # noqa: ANN401 (what the side says)
    try:
        return side.recv()
    except EOFError:
        raise TrainingFailed(
            "WORKER_DIED",
            f"a side of the comparison ended before its time: {name}",
            cure=f"Give --out FOLDER, and see {_log(setting, name).name} there.",
        ) from None
