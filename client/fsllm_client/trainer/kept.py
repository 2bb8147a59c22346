"""Tensors that a site keeps to itself from round to round: the optimizer's state, a method's, its personal adapter.

A file a round: a round that is trained again, after a crash between training and delivery, starts from the state of the
round before it and so gives the same delta, bit for bit. The files hold whole tensors by name, so they fit any ZeRO
stage and number of ranks. No random number generator is kept: a round's randomness follows from the plan's seed, the
round and the rank (``loop``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from fsllm_client.trainer.tensor_files import read_tensors, write_tensors
from fsllm_common.failpoints import reach
from fsllm_common.files import disk_errors, sync_folder

if TYPE_CHECKING:
    import torch

OPTIMIZER: Final = "optimizer"
"""Plan: ``train.optimizer_state: keep``."""
PRIVATE: Final = "private"
"""``own/NAME``: the site's personal tensors of the adapter; ``rule/NAME``: ``LocalRule.private``."""

_KEPT: Final = ".safetensors"
_WAITING: Final = ".unacknowledged"


@dataclass(frozen=True, slots=True)
class Kept:
    """The files of one kind in a run's private folder: what the last round has left, and what it started from.

    A round's file may wait for the server's receipt (``LocalRule.awaits_receipt``): until the daemon says that it is
    here, no round starts from that file.
    """

    folder: Path
    kind: str

    def origin(self, round_number: int) -> int | None:
        """Return the round whose state ``round_number`` starts from: the newest earlier one, or None.

        Where there is none, and later ones are: the newest of those. Then the server was restored from a back-up, and a
        state that is some rounds ahead of the version is better than none.
        """
        rounds = self._rounds()
        earlier = [number for number in rounds if number < round_number]
        # A file of the round itself is of an attempt that is made again.
        later = [number for number in rounds if number > round_number]
        return max(earlier or later, default=None)

    def before(self, round_number: int) -> dict[str, torch.Tensor] | None:
        """Return what ``round_number`` starts from, by name."""
        origin = self.origin(round_number)
        return read_tensors(self._file(origin)) if origin is not None else None

    def save(self, round_number: int, tensors: Mapping[str, torch.Tensor], *, acknowledged: bool = True) -> None:
        """Keep what ``round_number`` leaves beside what it started from, and drop everything else.

        Args:
            round_number: Counted from 1.
            tensors: By name; nothing is done where there are none.
            acknowledged: False for a state that waits for ``acknowledge``.

        Raises:
            Unavailable: DISK_FULL, DISK_FAILED: what the round started from is there.

        """
        if not tensors:
            return
        origin = self.origin(round_number)
        if origin is not None and origin > round_number:
            # Under its own number it would be taken for what a round to come has left.
            write_tensors(self._file(round_number - 1), read_tensors(self._file(origin)))
            origin = round_number - 1
        target = self._file(round_number) if acknowledged else self._waiting(round_number)
        stays = {target, self._file(origin)} if origin is not None else {target}
        # First, so that the sync of what is written next makes this last: no round may start from what was dropped.
        for path in {*self.folder.glob(f"{self.kind}-*{_KEPT}"), *self.folder.glob(f"{self.kind}-*{_WAITING}")} - stays:
            path.unlink(missing_ok=True)
        write_tensors(target, tensors)

    def awaits(self, round_number: int) -> bool:
        """Tell whether what ``round_number`` has left waits for the receipt of its update."""
        return self._waiting(round_number).is_file()

    def acknowledge(self, round_number: int) -> None:
        """The server has the update of ``round_number``: what it has left counts from now on. Needs no torch.

        Raises:
            Unavailable: DISK_FAILED.

        """
        if self.awaits(round_number):
            with disk_errors(self.folder):
                reach("file.rename")
                self._waiting(round_number).replace(self._file(round_number))
                reach("file.renamed")
                sync_folder(self.folder)

    def _rounds(self) -> list[int]:
        if not self.folder.is_dir():
            return []
        name = re.compile(rf"{self.kind}-(\d{{8}}){re.escape(_KEPT)}")
        return [int(match[1]) for path in self.folder.iterdir() if (match := name.fullmatch(path.name))]

    def _file(self, round_number: int) -> Path:
        return self.folder / f"{self.kind}-{round_number:08d}{_KEPT}"

    def _waiting(self, round_number: int) -> Path:
        return self.folder / f"{self.kind}-{round_number:08d}{_WAITING}"


@dataclass(frozen=True, slots=True)
class Private:
    """What a site keeps for a method."""

    own: Mapping[str, torch.Tensor]
    """The personal tensors of its adapter."""
    rule: Mapping[str, torch.Tensor]
    """``LocalRule.private``."""

    @classmethod
    def of(cls, stored: Mapping[str, torch.Tensor] | None) -> Private:
        """Return it from a file's tensors; nothing, where there is none."""
        tensors = stored or {}
        own, rule = (
            {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
            for prefix in ("own/", "rule/")
        )
        return cls(own, rule)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return a file's tensors."""
        return {f"own/{name}": tensor for name, tensor in self.own.items()} | {
            f"rule/{name}": tensor for name, tensor in self.rule.items()
        }
