"""Noise: the Gaussian mechanism on a clipped delta, i.e. local, client-level differential privacy.

Client half: delta <- delta + N(0, (z C)^2) on every coordinate, fresh in each call, from a generator seeded with 256
bits of the operating system's randomness. What is protected is a site's whole contribution to a round: zero-out
adjacency (the site's delta against none), of which C is the sensitivity; replacing one delta by another has 2C, i.e.
half the multiplier. Server half: there is no hard limit to a Gaussian, but a norm beyond C + z C (sqrt(P) + 10) has
probability < e^-50 (Lipschitz concentration), so that it is refused.

Known limit: float64 Gaussians are not exactly Gaussian in their last bits (Mironov 2012, CCS); rounding to the wire's 8
or 16 bits hides most of that, but this is not a proof.
"""

from __future__ import annotations

import math
import secrets
from typing import TYPE_CHECKING, ClassVar

from fsllm_common.pipeline.stage import Facts, Stage

if TYPE_CHECKING:
    import numpy as np

    from fsllm_common.pipeline.stage import Arrays
    from fsllm_common.plan.schema import Clip, Noise

_BLOCK = 1 << 16
_TAIL = 10.0
"""Deviations beyond the expected norm: exp(-10^2 / 2)."""


class NoiseStage(Stage):
    """Gaussian noise of a deviation relative to the clip's norm."""

    name: ClassVar[str] = "noise"

    def __init__(self, noise: Noise, clip: Clip, generator: np.random.Generator | None = None) -> None:
        """Make the stage.

        Args:
            noise: The plan's.
            clip: The clip that stands before.
            generator: For tests only; fresh secret randomness for every call when omitted.

        """
        self.deviation = noise.multiplier * clip.norm
        self._generator = generator

    def client(self, delta: Arrays, facts: Facts) -> None:
        """Add noise to every element."""
        import numpy as np

        generator = self._generator or np.random.Generator(np.random.PCG64DXSM(secrets.randbits(256)))
        for name in sorted(delta):
            array = delta[name]
            flat = np.ascontiguousarray(array).reshape(-1)
            for start in range(0, flat.size, _BLOCK):
                block = flat[start : start + _BLOCK]
                # Drawn and added in float64, then rounded once.
                block[:] = block + self.deviation * generator.standard_normal(block.size)
            if not np.shares_memory(flat, array):
                array[...] = flat.reshape(array.shape)
        facts.noise_deviation = self.deviation

    def bound(self, norm: float, parameters: int) -> float:
        """Return the norm that came in, and the noise's at its very largest."""
        return norm + self.deviation * (math.sqrt(parameters) + _TAIL)
