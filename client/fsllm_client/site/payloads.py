"""Between the trainer's safetensors files and the wire's payloads. Slow: called in a thread, not in the loop."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from fsllm.v1.tensors_pb2 import Manifest
from fsllm_client.link.download import CachedVersion
from fsllm_common.algorithms import algorithm_class
from fsllm_common.algorithms.layers import cut, module_and_key
from fsllm_common.errors import FsllmError
from fsllm_common.plan import Plan
from fsllm_common.tensors.manifest import WIRE_TYPES

if TYPE_CHECKING:
    from fsllm_common.pipeline import Facts
    from fsllm_common.tensors.arrays import Arrays

TOLERANCE: Final = 1e-6
"""How far this site's version 0 may be from the server's, in float32: other CPUs add in another order."""

# Half a unit in the last place, relative, and of float16's subnormals, absolute.
_ROUNDING: Final = {"fp32": 2.0**-24, "bf16": 2.0**-8, "fp16": 2.0**-11}
_SUBNORMAL: Final = {"fp32": 0.0, "bf16": 0.0, "fp16": 2.0**-25}

# numpy, ml_dtypes and safetensors are imported in the functions: a daemon that waits for orders holds none of them.


def write_adapter(parts: Sequence[CachedVersion], target: Path) -> None:
    """Write a downloaded version as the float32 safetensors file that the trainer reads, and nobody after a crash.

    Raises:
        FsllmError: DISK_FULL, STATE_CORRUPT.

    """
    from fsllm_common.tensors.arrays import save_arrays

    save_arrays(_arrays(parts), target, durable=False)


def encode_adapter(adapter: Path, plan: Plan, payload: Path) -> Manifest:
    """Write the payload of a version 0 that the trainer built: in float32, so that the server's master is exact.

    Raises:
        FsllmError: NOT_FINITE, DISK_FULL.

    """
    from fsllm_common.tensors.arrays import from_safetensors

    extra = algorithm_class(plan.algorithm.name)(plan).extra
    return from_safetensors(adapter, WIRE_TYPES["fp32"], payload, extra)


def encode_delta(delta: Path, plan: Plan, payload: Path) -> "tuple[Manifest, Facts]":
    """Pass a trained delta through the plan's pipeline and write what is left as the payload of an update.

    Raises:
        FsllmError: NOT_FINITE, DISK_FULL.

    """
    from fsllm_common.pipeline import apply_client, build
    from fsllm_common.tensors.arrays import encode, load_arrays

    arrays, facts = apply_client(build(plan), load_arrays(delta))
    return encode(arrays, WIRE_TYPES[plan.wire.element_type], payload), facts


def refuse_difference(own: CachedVersion, theirs: Sequence[CachedVersion], plan: Plan, rank: int) -> None:
    """Compare this site's version 0 (float32) with the run's: names and shapes exactly, values within ``TOLERANCE``.

    The run's was rounded to the wire's type, so half a unit in its last place is allowed besides. ``rank``: of this
    site's adapter, which is what it was given of the run's.

    Raises:
        FsllmError: VERSION_ZERO_MISMATCH, with the first tensor that differs and by how much.

    """
    import numpy as np

    from fsllm_common.tensors.arrays import decode

    kind = plan.wire.element_type
    published = _arrays(theirs)
    ours = {
        name: cut(module_and_key(name)[1], array.astype(np.float64), rank, plan)
        for name, array in decode(own.manifest, own.payload).items()
    }
    if differing := sorted(ours.keys() ^ published.keys()):
        whose = "this site's" if differing[0] in ours else "the run's"
        raise _mismatch(f"only {whose} version 0 has {differing[0]} ({len(differing)} such tensors)")
    for name, array in ours.items():
        other = published[name]
        if array.shape != other.shape:
            raise _mismatch(f"{name} has shape {list(array.shape)} here and {list(other.shape)} in the run")
        difference = np.abs(array - other)
        # The builder's value is within TOLERANCE of ours, and the published one within a rounding of the builder's.
        allowed = TOLERANCE + _ROUNDING[kind] * (np.abs(array) + TOLERANCE) + _SUBNORMAL[kind]
        if not bool(np.all(difference <= allowed)):
            raise _mismatch(f"{name} differs by up to {float(np.max(difference)):.3g}")


def _arrays(parts: Sequence[CachedVersion]) -> "Arrays":
    """Return all tensors of a version; no two parts have one of the same name (fsllm.v1.Version)."""
    from fsllm_common.tensors.arrays import decode

    return {name: array for part in parts for name, array in decode(part.manifest, part.payload).items()}


def _mismatch(what: str) -> FsllmError:
    return FsllmError("VERSION_ZERO_MISMATCH", f"This site's version 0 is not the run's: {what}")
