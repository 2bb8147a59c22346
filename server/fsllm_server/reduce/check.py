"""What an upload must be before it counts: the bytes its digest names, finite, and within the plan's norm."""

import math
from pathlib import Path

from fsllm.v1.tensors_pb2 import Manifest
from fsllm_common.errors import UpdateRejected
from fsllm_common.tensors.arrays import BLOCK, square_sum, widen
from fsllm_common.tensors.manifest import WIDTH, PayloadDigest, element_count
from fsllm_server.reduce.blocks import block_reader, blocks, uniform_type


class PayloadCheck:
    """Takes a payload's bytes in order, in pieces of any size, and then judges it."""

    def __init__(self, manifest: Manifest) -> None:
        """Begin.

        Args:
            manifest: Validated; of one element type.

        """
        self._manifest = manifest
        self._type = uniform_type(manifest)
        self._width = WIDTH[self._type]
        self._digest = PayloadDigest(manifest)
        self._squares = 0.0
        self._elements = 0
        self._rest = b""
        """Of an element whose last bytes are still to come."""
        self._broken: tuple[int, int] | None = None
        """First element and length of the first block that is not finite."""

    def update(self, data: memoryview) -> None:
        """Take the next bytes."""
        self._digest.update(data)
        whole = memoryview(self._rest + data) if self._rest else data
        end = len(whole) - len(whole) % self._width
        self._rest = bytes(whole[end:])
        # In blocks of one size, so that the norm's last bits do not depend on where an upload was interrupted.
        for start in range(0, end, BLOCK * self._width):
            self._take(whole[start : min(start + BLOCK * self._width, end)])

    def read(self, path: Path) -> None:
        """Take a whole file."""
        with block_reader(path, self._type) as reader:
            for start, count in blocks(sum(map(element_count, self._manifest.tensors))):
                reader.read(start, count)
                self.update(reader.last)

    def finish(self, path: Path, max_norm: float | None) -> float:
        """Return the L2 norm over all tensors, in float64.

        Args:
            path: Where the payload is, of which all bytes were taken; read only to find a value that is not finite.
            max_norm: The largest norm to accept; None: any finite one.

        Raises:
            UpdateRejected: DIGEST_MISMATCH, NOT_FINITE (naming the tensor), NORM_TOO_LARGE.

        """
        if self._digest.digest() != self._manifest.digest:
            message = f"The payload's digest is {self._digest.hexdigest()[:12]}, not {self._manifest.digest.hex()[:12]}"
            raise UpdateRejected("DIGEST_MISMATCH", message)
        if self._broken is not None:
            start, count = self._broken
            with block_reader(path, self._type) as reader:
                values = reader.read(start, count).tolist()
            at = start + next(i for i, value in enumerate(values) if not math.isfinite(value))
            raise UpdateRejected("NOT_FINITE", f"Tensor {_tensor_at(self._manifest, at)!r} holds NaN or Inf")
        norm = math.sqrt(self._squares)
        if max_norm is not None and norm > max_norm:
            raise UpdateRejected("NORM_TOO_LARGE", f"The update's norm is {norm:.6g}; the plan allows {max_norm:.6g}")
        return norm

    def _take(self, block: memoryview) -> None:
        count = len(block) // self._width
        squares = square_sum(widen(block, self._type))
        if self._broken is None and not math.isfinite(squares):
            self._broken = self._elements, count
        self._squares += squares
        self._elements += count


def _tensor_at(manifest: Manifest, element: int) -> str:
    """Return the name of the tensor that holds the payload's ``element``."""
    for spec in manifest.tensors:
        element -= element_count(spec)
        if element < 0:
            return spec.name
    raise IndexError(element)
