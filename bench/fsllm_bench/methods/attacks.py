"""A site that lies: a real daemon whose deltas are spoilt before they are sent, outside the product's code.

``python -m fsllm_bench.methods.attacks`` takes the options of ``fsllm-client``. Whether it lies in a run, and how, the
run's name says: what stands behind its last ``--``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final
from unittest.mock import patch

from fsllm_client.site import payloads

if TYPE_CHECKING:
    from fsllm.v1.tensors_pb2 import Manifest
    from fsllm_common.pipeline import Facts
    from fsllm_common.plan import Plan
    from fsllm_common.tensors.arrays import Arrays

    Encode = Callable[[Path, Plan, Path], tuple[Manifest, Facts]]

NONE: Final = "none"


def flip(delta: Arrays) -> Arrays:
    """Return the opposite, ten times as long: at its own length one of five only slows the mean down."""
    return {name: array * array.dtype.type(-10) for name, array in delta.items()}


def scale(delta: Arrays) -> Arrays:
    """Return what was learned, fifty times over."""
    return {name: array * array.dtype.type(50) for name, array in delta.items()}


def randomise(delta: Arrays) -> Arrays:
    """Return normal noise, ten times as long as the delta."""
    import numpy as np

    generator = np.random.Generator(np.random.PCG64(0))
    squares = sum(float(np.sum(np.square(array, dtype=np.float64))) for array in delta.values())
    deviation = 10 * (squares / sum(array.size for array in delta.values())) ** 0.5
    return {
        name: (generator.standard_normal(array.shape, np.float32) * np.float32(deviation)).astype(array.dtype)
        for name, array in delta.items()
    }


ATTACKS: Final[Mapping[str, Callable[[Arrays], Arrays]]] = {"sign-flip": flip, "scaled": scale, "random": randomise}


def lying(encode: Encode) -> Encode:
    """Return ``encode_delta`` with a lie before it, in runs whose name asks for one."""

    def encode_lie(delta: Path, plan: Plan, payload: Path) -> tuple[Manifest, Facts]:
        if attack := ATTACKS.get(plan.name.rpartition("--")[2]):
            from fsllm_common.tensors.arrays import load_arrays, save_arrays

            save_arrays(attack(load_arrays(delta)), delta, durable=False)
        return encode(delta, plan, payload)

    return encode_lie


if __name__ == "__main__":
    from fsllm_client.cli import main

    with patch.object(payloads, "encode_delta", lying(payloads.encode_delta)):
        main()
