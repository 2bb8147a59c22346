"""What methods share that send a few numbers in place of an adapter, and directions by their seeds alone.

A direction z is a fair sign an element, of mean 0 and variance 1 (the simultaneous perturbation of Spall 1992, whose
estimate varies less than a Gaussian one's); the papers draw Gaussian or truncated normal numbers. Signs are exact on
every device and cost one bit of a counter-based generator each (``philox``), which knows the element by its tensor's
name and its place.

A rebuilt adapter is base + sum_j c_j z_j. Each c_j is rounded to a multiple of 2**-44 first, so that the sum is one of
whole numbers, which float64 holds exactly: its order, and so the device, the library and the number of threads, decide
nothing. Nor does it matter whether it was made at once or step by step.
"""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Generator, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from fsllm.v1.tensors_pb2 import TENSOR_ROLE_SCALAR
from fsllm_common import philox
from fsllm_common.algorithms.algorithm import ADAPTER
from fsllm_common.algorithms.fedavg import FedAvg
from fsllm_common.algorithms.local_rule import LocalRule, LocalStep, Turn
from fsllm_common.errors import TrainingFailed
from fsllm_common.tensors.manifest import role_of

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch

    from fsllm.v1.tensors_pb2 import TensorRole
    from fsllm_common.algorithms.local_rule import Tensors

    Array = npt.NDArray[np.float32]
    Wide = npt.NDArray[np.float64]

SCALARS: Final = "scalars/"

UNIT: Final = 2.0**-44
_MOST_UNITS: Final = 2.0**51  # of what is summed at once: twice as many float64 still counts one by one

_ELEMENTS: Final = 1 << 15
_COUNTERS: Final = 1 << 13


@dataclass(frozen=True, slots=True)
class Directions:
    """Some directions of one tensor.

    Args:
        keys: (directions,), of 64 bits.
        stream: The tensor's.

    """

    keys: npt.NDArray[np.int64]
    stream: int

    def sum(self, steps: Wide, elements: int) -> Wide:
        """Return sum_j steps_j z_j, (elements,), in float64: exactly, where the steps are whole numbers."""
        import numpy as np

        total: Wide = np.zeros(elements)
        for some, start, stop, bits in self._pieces(elements, np.flatnonzero(steps)):
            # Whole numbers below 2**53 all along, however the product adds them up.
            total[start:stop] += 2 * (steps[some] @ bits)
        total -= steps.sum()
        return total

    def products(self, values: npt.NDArray[np.float32]) -> Wide:
        """Return z_j . values for each direction."""
        import numpy as np

        flat = values.reshape(-1).astype(np.float64)
        found: Wide = np.zeros(len(self.keys))
        for some, start, stop, bits in self._pieces(flat.size, np.arange(len(self.keys))):
            found[some] += 2 * (bits @ flat[start:stop])
        found -= flat.sum()
        return found

    def _pieces(
        self, elements: int, wanted: npt.NDArray[np.intp]
    ) -> Generator[tuple[npt.NDArray[np.intp], int, int, Wide]]:
        """Yield bits as float64, (directions, elements), in pieces that fit a cache."""
        import numpy as np

        for start in range(0, elements, _ELEMENTS):
            stop = min(elements, start + _ELEMENTS)
            count = max(1, _COUNTERS * philox.BITS // (stop - start))
            for first in range(0, len(wanted), count):
                some = wanted[first : first + count]
                yield some, start, stop, philox.bits(self.keys[some], self.stream, start, stop).astype(np.float64)


def units(steps: Wide) -> Wide:
    """Return steps as whole numbers of ``UNIT``.

    Raises:
        TrainingFailed: LOSS_NOT_FINITE: they are too large for the sum of their directions to be exact (128 in all), or
            not finite.

    """
    import numpy as np

    whole: Wide = np.rint(steps / UNIT)
    demand_exact(float(np.abs(whole).sum()))
    return whole


def demand_exact(most: float) -> None:
    """Refuse so many units as the sum of float64 would not be exact for.

    Raises:
        TrainingFailed: LOSS_NOT_FINITE.

    """
    if not most < _MOST_UNITS:
        raise TrainingFailed("LOSS_NOT_FINITE", "the numbers that the adapter is rebuilt from are beyond all measure")


def moved(base: Array, by: Wide) -> Array:
    """Return base + so many units of each element, in float32."""
    import numpy as np

    value: Array = (base.astype(np.float64) + by.reshape(base.shape) * UNIT).astype(np.float32)
    return value


def digest(adapter: Mapping[str, Array]) -> bytes:
    """Return the BLAKE3 of an adapter: of each tensor's name, a line feed, and its float32 bytes, sorted by name."""
    import numpy as np
    from blake3 import blake3

    found = blake3()
    for name, array in sorted(adapter.items()):
        found.update(name.encode() + b"\n")
        found.update(np.ascontiguousarray(array, dtype="<f4").tobytes())
    return found.digest()


def drawn(rule: LocalRule, step: LocalStep) -> int:
    """Return a random number of 64 bits, with its sign: another one at each site, in each round and step."""
    text = f"{rule.plan.seed}/{rule.site}/{rule.round}/{step.number}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little", signed=True)


def losses_beside(step: LocalStep, at: Tensors, key: int, eps: float) -> tuple[float, float]:
    """Return the step's losses at w + eps z and w - eps z, and leave the adapter somewhere there.

    z is made anew each time it is needed, a tensor at a time.
    """
    found = []
    for signed in (eps, -eps):
        step.write({name: value.add(direction(name, value, key), alpha=signed) for name, value in at.items()})
        found.append(step.loss())
    return found[0], found[1]


def direction(name: str, value: torch.Tensor, key: int) -> torch.Tensor:
    """Return a tensor's z."""
    import torch

    return torch.from_numpy(philox.signs(tuple(value.shape), key, philox.stream(name)))


class Rebuilt(FedAvg):
    """The server's half: version 0's adapter stays as it is, and beside it stand the numbers that move it."""

    @property
    def personalised(self) -> bool:
        """Return False: what sites evaluate is theirs alone to make, and the same everywhere."""
        return False

    def part(self, role: TensorRole.ValueType) -> str:
        """Return the numbers' part, or the adapter's."""
        return "coefficients" if role == TENSOR_ROLE_SCALAR else super().part(role)

    def trained(self, round_: int) -> tuple[str, ...]:
        """Return the adapter, though it is not what is sent."""
        return (ADAPTER,)

    def moves(self, names: Iterable[str]) -> list[str]:
        """Return those of the adapter's tensors that are ever trained."""
        return [name for name in names if "/" not in name and self.part(role_of(name)) == ADAPTER]

    @abstractmethod
    def distances(self, tensors: Mapping[str, Array]) -> Mapping[str, Wide]:
        """Return how many units each tensor has moved from version 0, from all tensors of a version."""

    def exported(self, tensors: Mapping[str, Array]) -> dict[str, Array]:
        """Return the rebuilt adapter."""
        return rebuilt(tensors, self.distances(tensors))


def rebuilt(tensors: Mapping[str, Array], distances: Mapping[str, Wide]) -> dict[str, Array]:
    """Return a version's adapter, with those of its tensors moved that have moved."""
    adapter = {name: array for name, array in tensors.items() if "/" not in name}
    return adapter | {name: moved(adapter[name], by) for name, by in distances.items()}


class Rebuilding(LocalRule):
    """The client's half: rebuild the version's adapter before it is trained or measured."""

    def method(self) -> Rebuilt:
        """Return the server's half."""
        from fsllm_common.algorithms import algorithm_class

        method = algorithm_class(self.plan.algorithm.name)(self.plan)
        assert isinstance(method, Rebuilt)  # noqa: S101 (whose rule this is)
        return method

    def receive(self, base: Tensors, extra: Tensors) -> None:
        """Rebuild the adapter, and say which it is."""
        self._tensors = {name: tensor.numpy() for name, tensor in {**base, **extra}.items()}
        self._far = dict(self.method().distances(self._tensors))
        adapter = rebuilt(self._tensors, self._far)
        self.model_digest = digest(adapter)
        self._start = as_torch(adapter)

    def turns(self, base: Tensors, steps: int) -> Generator[Turn, Tensors, Tensors]:
        """Begin with the rebuilt adapter."""
        return (yield Turn(self._start, steps))

    def evaluated(self, base: Tensors, extra: Tensors) -> Tensors:
        """Return the rebuilt adapter."""
        return as_torch(self.method().exported({name: tensor.numpy() for name, tensor in {**base, **extra}.items()}))


def as_torch(arrays: Mapping[str, Array]) -> dict[str, torch.Tensor]:
    """Return the same numbers as tensors."""
    import torch

    return {name: torch.from_numpy(array) for name, array in arrays.items()}
