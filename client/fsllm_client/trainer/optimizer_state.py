"""The optimizer's state kept from round to round (plan: ``train.optimizer_state: keep``), durable at the site.

A file a round: a round that is trained again, after a crash between training and delivery, starts from the state of the
round before it and so gives the same delta, bit for bit. The file holds whole tensors by name, so it fits any ZeRO
stage and number of ranks. No random number generator is kept: a round's randomness follows from the plan's seed, the
round and the rank (``loop``).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from fsllm_client.trainer.tensor_files import read_tensors, write_tensors

if TYPE_CHECKING:
    from fsllm_client.trainer.engine import Engine

_NAME = re.compile(r"optimizer-(\d{8})\.safetensors")
_KEPT = 2


def load_before(folder: Path, round_number: int, engine: Engine) -> bool:
    """Give the engine the newest state of an earlier round, or a fresh one. Tell whether there was any."""
    earlier = [number for number in _rounds(folder) if number < round_number]
    if not earlier:
        engine.reset_optimizer()
        return False
    engine.write_optimizer(read_tensors(_file(folder, max(earlier))))
    return True


def save(folder: Path, round_number: int, engine: Engine, *, writes: bool) -> None:
    """Keep the engine's state after ``round_number``, and drop what no round can start from any more.

    Call it on every rank; only the one that ``writes`` touches the disk.
    """
    states = engine.read_optimizer()
    if not states or not writes:
        return
    write_tensors(_file(folder, round_number), states)
    for number in _rounds(folder)[:-_KEPT]:
        _file(folder, number).unlink(missing_ok=True)


def _rounds(folder: Path) -> list[int]:
    if not folder.is_dir():
        return []
    return sorted(int(match[1]) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name)))


def _file(folder: Path, round_number: int) -> Path:
    return folder / f"optimizer-{round_number:08d}.safetensors"
