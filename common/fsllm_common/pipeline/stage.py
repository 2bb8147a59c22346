"""What a pipeline stage is: a client half that changes the delta before it leaves, a server half that knows what may
come."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Arrays = dict[str, npt.NDArray[np.float32]]


@dataclass(slots=True)
class Facts:
    """What the stages did to one delta."""

    norm: float | None = None
    """L2 of the delta before the stages; private when noise was added."""
    clip_norm: float | None = None
    clipped: bool = False
    noise_deviation: float | None = None
    """Standard deviation of the noise on each coordinate."""

    def metrics(self) -> dict[str, float]:
        """Return what may leave the site beside the delta. With noise, nothing that depends on the data."""
        out: dict[str, float] = {}
        if self.clip_norm is not None:
            out["clip_norm"] = self.clip_norm
        if self.noise_deviation is not None:
            out["noise_deviation"] = self.noise_deviation
        elif self.norm is not None:
            out["delta_norm"] = self.norm
            out["clipped"] = float(self.clipped)
        return out


class Stage(ABC):
    """One stage of a plan's pipeline, both halves."""

    name: ClassVar[str]

    @abstractmethod
    def client(self, delta: Arrays, facts: Facts) -> None:
        """Change the delta (float32, by name) in place, and note what was done.

        Raises:
            FsllmError: NOT_FINITE.

        """

    @abstractmethod
    def bound(self, norm: float, parameters: int) -> float:
        """Return the largest L2 norm that can honestly come out of the stage when at most ``norm`` went in.

        Args:
            norm: May be infinite.
            parameters: The number of elements of the delta.

        """
