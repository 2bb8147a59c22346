"""Answer tokens a second, ours and the plain Trainer's: two resident processes that take turns, pass by pass."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from fsllm_bench.training import ours, plain
from fsllm_bench.training.setting import Setting
from fsllm_client.settings import extensions_folder
from fsllm_client.trainer.cpu_adam import default_folder
from fsllm_client.trainer.launch import environment, gpus
from fsllm_common.errors import TrainingFailed


@dataclass(frozen=True, slots=True)
class Side:
    """What one side did."""

    losses: list[float]
    """On the held-out rows: before the first pass and after each."""
    seconds: list[float] = field(default_factory=list)
    """A pass, the warm-up left out."""

    def speed(self, tokens: int) -> float:
        """Return the median over the passes of so many tokens a second."""
        return tokens / statistics.median(self.seconds)


@dataclass(frozen=True, slots=True)
class Compared:
    """Both sides of one setting."""

    ours: Side
    plain: Side
    other: Side
    """Ours again with the batches in another order, not timed: how far losses differ by chance."""

    @property
    def ratio(self) -> float:
        """Our speed over the plain Trainer's."""
        return statistics.median(self.plain.seconds) / statistics.median(self.ours.seconds)


def compare(setting: Setting, *, threads: int, tell: Callable[[str], None]) -> Compared:
    """Let both train ``setting.passes`` passes, in turns. The first pass is the warm-up.

    Both begin with the same adapter and are measured by the same evaluation on the same held-out rows.

    Raises:
        TrainingFailed: WORKER_DIED.

    """
    extensions = extensions_folder(None) or default_folder()
    os.environ.update(environment(extensions=extensions, ranks=1, threads=threads, gpu=gpus() > 0))
    with _side(ours.serve, setting) as us, _side(plain.serve, setting) as them:
        version = _answer(us, "ours", setting)
        them.send(version)
        us.send(("loss", version))
        before = _answer(us, "ours", setting)
        sides = Compared(Side([before]), Side([before]), Side([before]))

        def take_turn(name: str, side: Connection, found: Side, chain: int = 0, *, counts: bool = True) -> None:
            side.send(("train", chain))
            seconds, adapter = _answer(side, name, setting)
            us.send(("loss", adapter))
            found.losses.append(_answer(us, "ours", setting))
            if counts:
                found.seconds.append(seconds)
            speed = setting.answer_tokens / seconds
            tell(
                f"{name}: {speed:.0f} answer tokens/s, loss {found.losses[-1]:.4f}{'' if counts else ' (not counted)'}"
            )

        for number in range(setting.passes):
            take_turn("ours", us, sides.ours, counts=number > 0)
            take_turn("plain", them, sides.plain, counts=number > 0)
        for _ in range(setting.passes):
            take_turn("ours", us, sides.other, chain=1, counts=False)
        us.send(None)
    return sides


@contextlib.contextmanager
def _side(serve: Callable[[Setting, Connection], None], setting: Setting) -> Iterator[Connection]:
    # Spawned, not forked: an interpreter of its own, that reads the environment anew.
    context = multiprocessing.get_context("spawn")
    mine, theirs = context.Pipe()
    log = _log(setting, serve.__module__.rpartition(".")[2])
    process = context.Process(target=_logged, args=(serve, setting, theirs, log), daemon=True)
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
