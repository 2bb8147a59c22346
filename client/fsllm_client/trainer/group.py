"""The ranks that train together: one process each, one device each."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import torch

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Group:
    """This process among the ranks."""

    rank: int
    world: int
    device: torch.device

    def share(self, work: Sequence[T]) -> list[tuple[T, bool]]:
        """Return this rank's part of ``work``, equally long on every rank, each with whether it counts.

        A rank that is dealt less does a piece again that does not count: under ZeRO-3 every forward pass is everyone's.
        """
        mine = [(piece, True) for piece in work[self.rank :: self.world]]
        longest = -(-len(work) // self.world)
        return mine + [(work[-1], False)] * (longest - len(mine))

    def total(self, *values: float) -> list[float]:
        """Return the sums over all ranks, in float64. Call it on every rank."""
        import torch

        sums = torch.tensor(values, dtype=torch.float64, device=self.device)
        if self.world > 1:
            torch.distributed.all_reduce(sums)
        return [float(value) for value in sums.tolist()]


def join(rank: int, world: int) -> Group:
    """Meet the other ranks, as torchrun's environment names them, and take this rank's device."""
    import torch

    local = int(os.environ.setdefault("LOCAL_RANK", "0"))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if not torch.distributed.is_initialized():
        backend = "nccl" if cuda else "gloo"
        if world == 1:
            # A rank alone meets nobody: no port is opened.
            store = torch._C._distributed_c10d.HashStore()
            torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
        else:
            torch.distributed.init_process_group(backend)
    return Group(rank, world, device)
