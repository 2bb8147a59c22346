"""What an upload must be before it counts: the bytes its digest names, finite, and within the plan's norm."""

import math
from pathlib import Path

from fsllm.v1.tensors_pb2 import Manifest
from fsllm_common.errors import UpdateRejected
from fsllm_common.tensors.arrays import square_sum
from fsllm_common.tensors.manifest import PayloadDigest, element_count
from fsllm_server.reduce.blocks import block_reader, blocks, uniform_type


def check_payload(path: Path, manifest: Manifest, max_norm: float | None) -> float:
    """Return the payload's L2 norm over all tensors, from one pass over the file.

    Args:
        path: The payload, as long as the manifest states.
        manifest: Validated; of one element type.
        max_norm: The largest norm to accept; None: any finite one.

    Raises:
        UpdateRejected: DIGEST_MISMATCH, NOT_FINITE (naming the tensor), NORM_TOO_LARGE.

    """
    element_type = uniform_type(manifest)
    counts = [element_count(spec) for spec in manifest.tensors]
    digest = PayloadDigest(manifest)
    squares = 0.0
    broken: tuple[int, int] | None = None
    with block_reader(path, element_type) as reader:
        for start, count in blocks(sum(counts)):
            values = reader.read(start, count)
            digest.update(reader.last)
            block = square_sum(values)
            if broken is None and not math.isfinite(block):
                broken = start, count
            squares += block
        if digest.digest() != manifest.digest:
            message = f"The payload's digest is {digest.hexdigest()[:12]}, not {manifest.digest.hex()[:12]}"
            raise UpdateRejected("DIGEST_MISMATCH", message)
        if broken is not None:
            values = reader.read(*broken)
            at = broken[0] + next(i for i, value in enumerate(values.tolist()) if not math.isfinite(value))
            raise UpdateRejected("NOT_FINITE", f"Tensor {_tensor_at(manifest, at)!r} holds NaN or Inf")
    norm = math.sqrt(squares)
    if max_norm is not None and norm > max_norm:
        raise UpdateRejected("NORM_TOO_LARGE", f"The update's norm is {norm:.6g}; the plan allows {max_norm:.6g}")
    return norm


def _tensor_at(manifest: Manifest, element: int) -> str:
    """Return the name of the tensor that holds the payload's ``element``."""
    for spec in manifest.tensors:
        element -= element_count(spec)
        if element < 0:
            return spec.name
    raise IndexError(element)
