"""Ferret (Shu et al. 2024, arXiv 2409.06277): first-order local training, of whose delta a few coordinates travel.

After its ordinary local steps a site projects its delta, tensor by tensor, on K random bases that all sites draw from
one seed, c_k = v_k . delta / (rho K), and sends these alone; the server takes their weighted mean, and every site
rebuilds w <- w + rate sum_k c_k v_k. As E[v v^T] = rho I, what is rebuilt is the delta on average; the fewer the
coordinates, the more noise is beside it, (elements / K) times the delta's square, so that the rate has to suit K.

The paper's: the projection without a matrix to invert, tensors as the blocks, fresh bases in each round. Not the
paper's: v of fair signs in place of truncated normal numbers (``seeds``; it meets their bound with equality), one seed
a round for all sites in place of one each, so that coordinates can be added up, and K shared out by the tensors' sizes,
where the authors' code looks at their norms and has a momentum at the server. Each round's coordinates stay with the
version, so that whoever comes late rebuilds the same; with its update a site sends the digest of what it has rebuilt.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field, PositiveInt

from fsllm_common import philox
from fsllm_common.algorithms.local_rule import Parameters, Turn
from fsllm_common.algorithms.seeds import SCALARS, Directions, Rebuilding, Rebuilt, as_torch, demand_exact, units

if TYPE_CHECKING:
    import torch

    from fsllm.v1.tensors_pb2 import TensorRole
    from fsllm_common.algorithms.local_rule import Tensors
    from fsllm_common.algorithms.seeds import Array, Wide
    from fsllm_common.plan import Plan


class FerretParameters(Parameters):
    """Ferret's own."""

    coordinates: PositiveInt = Field(
        default=4096, description="K, of a round, over all tensors; each has one at least, and no more than elements."
    )


def coordinates(round_: int) -> str:
    """Return the name of the tensor, and of the part, that holds a round's coordinates."""
    return f"{SCALARS}{round_:05d}"


def bases(plan: Plan, round_: int, name: str, count: int) -> Directions:
    """Return a tensor's bases of a round."""
    import numpy as np

    return Directions(np.arange(count, dtype=np.int64) + (plan.seed << 32), philox.stream(f"{round_}/{name}"))


class Projecting(Rebuilding):
    """Train as usual, and project the delta."""

    def turns(self, base: Tensors, steps: int) -> Generator[Turn, Tensors, Tensors]:
        """Keep the delta."""
        local = yield Turn(self._start, steps)
        self._delta = {name: local[name] - self._start[name] for name in self.trained}
        return local

    def produce(self, delta: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the delta's coordinates: z . delta / K with z = v / sqrt(rho), for a sum over z."""
        import numpy as np

        counts = self.method().counts({name: tensor.numel() for name, tensor in self._delta.items()})
        found = [
            bases(self.plan, self.round, name, count).products(self._delta[name].numpy()) / count
            for name, count in counts.items()
        ]
        return as_torch({coordinates(self.round): np.concatenate(found).astype(np.float32)})

    def method(self) -> Ferret:
        """Return the server's half."""
        return Ferret(self.plan)


class Ferret(Rebuilt):
    """The weighted mean of the coordinates."""

    name: ClassVar[str] = "ferret"
    departs = (
        "bases of fair signs, not of truncated normal numbers; one seed a round for all sites, so that "
        "coordinates can be added up; coordinates shared out by the tensors' sizes, where the authors' code looks "
        "at norms; no momentum at the server"
    )
    parameters_type = FerretParameters
    parameters: FerretParameters
    local_rule = Projecting

    def part_of(self, name: str, role: TensorRole.ValueType) -> str:
        """Return a part for each round's coordinates, or the adapter."""
        return name if name.startswith(SCALARS) else super().part_of(name, role)

    def moving(self, round_: int) -> tuple[str, ...]:
        """Return the round's coordinates."""
        return (coordinates(round_),)

    def extra(self, adapter: Mapping[str, tuple[int, ...]]) -> Mapping[str, Array]:
        """Return coordinates of 0 for each round to come."""
        import numpy as np

        counts = self.counts({name: int(np.prod(adapter[name])) for name in self.moves(adapter)})
        number = sum(counts.values())
        return {coordinates(round_): np.zeros(number, np.float32) for round_ in range(1, self.plan.rounds + 1)}

    def counts(self, elements: Mapping[str, int]) -> dict[str, int]:
        """Return how many coordinates each tensor has, sorted by name: by its share of all elements."""
        wanted, everything = self.parameters.coordinates, sum(elements.values())
        return {name: min(size, max(1, wanted * size // everything)) for name, size in sorted(elements.items())}

    def distances(self, tensors: Mapping[str, Array]) -> Mapping[str, Wide]:
        """Return the sum over all rounds.

        Raises:
            TrainingFailed: LOSS_NOT_FINITE: a tensor's coordinates of one round, or its elements, are so large that the
                sum would not be exact.

        """
        import numpy as np

        counts = self.counts({name: tensors[name].size for name in self.moves(tensors)})
        ends = dict(zip(counts, np.cumsum([*counts.values()]), strict=True))
        far = {name: np.zeros(tensors[name].shape) for name in counts}
        taken = [number for number in range(1, self.plan.rounds + 1) if tensors[coordinates(number)].any()]
        for number in taken:
            row = tensors[coordinates(number)].astype(np.float64)
            for name, count in counts.items():
                own = units(row[ends[name] - count : ends[name]])
                gained = bases(self.plan, number, name, count).sum(own, tensors[name].size)
                far[name] += gained.reshape(tensors[name].shape)
                demand_exact(float(np.abs(far[name]).max()))
        return far
