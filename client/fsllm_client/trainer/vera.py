"""VeRA's shared random projections (Kopiczko et al. 2024, arXiv 2310.11454). Needs only numpy.

W x + b * (B (d * (A x))): A and B are random, frozen and shared by all layers, each of which takes as many of their
columns and rows as it has inputs and outputs; the vectors d and b are trained, and they alone travel.

PEFT draws A and B from a seed by torch's uniform distribution, "which may not be accurate on all system
configurations" (its own warning). Every site must hold the same ones, so they are drawn by ``philox`` and put
in the place of PEFT's; an exported adapter holds them, so that PEFT draws nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from fsllm_common.philox import uniform

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Array = npt.NDArray[np.float32]

INPUTS: Final = "fsllm_vera_inputs"
"""Key of an adapter's configuration as it travels: the columns of A. No tensor tells them."""

_A, _B = "base_model.vera_A", "base_model.vera_B"
_OUTPUTS = ".vera_lambda_b"


def projections(seed: int, rank: int, inputs: int, outputs: int) -> tuple[Array, Array]:
    """Return A, (rank, inputs), and B, (outputs, rank), with Kaiming's uniform bounds as in PEFT."""
    return (
        uniform((rank, inputs), math.sqrt(6 / inputs), seed, stream_=0),
        uniform((outputs, rank), math.sqrt(6 / rank), seed, stream_=1),
    )


def is_vera(config: Mapping[str, Any]) -> bool:
    """Tell whether a PEFT configuration is of this kind."""
    return config.get("peft_type") == "VERA"


def with_projections(
    tensors: Mapping[str, Array], config: Mapping[str, Any]
) -> tuple[dict[str, Array], dict[str, Any]]:
    """Return tensors and configuration as PEFT reads them, from those that travel."""
    kept = dict(config)
    inputs = int(kept.pop(INPUTS))
    outputs = max(tensor.shape[0] for name, tensor in tensors.items() if name.endswith(_OUTPUTS))
    a, b = projections(int(config["projection_prng_key"]), int(config["r"]), inputs, outputs)
    return {**tensors, _A: a, _B: b}, kept
