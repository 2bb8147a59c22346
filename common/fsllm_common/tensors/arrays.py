"""Manifest and payload <-> float32 numpy arrays and safetensors files, in blocks that fit a cache.

Everything is computed in float32 (norms in float64); float16 and bfloat16 exist only in payloads. Conversion rounds to
the nearest, ties to even. Blocks of 256 K elements: converting whole tensors costs four times as much.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final, TypeAlias

import ml_dtypes
import numpy as np
import numpy.typing as npt
import safetensors
from safetensors import numpy as safetensors_numpy

from fsllm.v1.tensors_pb2 import (
    ELEMENT_TYPE_BFLOAT16,
    ELEMENT_TYPE_FLOAT16,
    ELEMENT_TYPE_FLOAT32,
    ElementType,
    Manifest,
    TensorRole,
)
from fsllm_common.errors import FsllmError, UpdateRejected
from fsllm_common.files import replacing
from fsllm_common.tensors.manifest import PayloadDigest, byte_count, describe, element_count, role_of

Array: TypeAlias = npt.NDArray[np.float32]
Arrays: TypeAlias = Mapping[str, Array]

BLOCK: Final = 1 << 18
"""Elements that are converted at a time."""


class _Scratch(threading.local):
    """Memory of a thread's own. Asked for anew for each block, it comes page by page, which costs more than the sum."""

    def __init__(self) -> None:
        self.wide = np.empty(BLOCK, dtype=np.float64)


_scratch: Final = _Scratch()

ADAPTER_CONFIG: Final = "adapter_config"
"""The metadata key of a safetensors file that holds the adapter's PEFT configuration as JSON."""

_DTYPES: Final[dict[ElementType.ValueType, np.dtype[Any]]] = {
    ELEMENT_TYPE_FLOAT32: np.dtype("<f4"),
    ELEMENT_TYPE_FLOAT16: np.dtype("<f2"),
    ELEMENT_TYPE_BFLOAT16: np.dtype(ml_dtypes.bfloat16),
}


def dtype_of(element_type: ElementType.ValueType) -> np.dtype[Any]:
    """Return the little-endian numpy dtype of a payload's elements."""
    return _DTYPES[element_type]


def widen(raw: bytes | memoryview | npt.NDArray[Any], element_type: ElementType.ValueType) -> Array:
    """Return a block of payload bytes as float32 of shape (elements,). A view when the payload is float32."""
    return np.frombuffer(raw, dtype=_DTYPES[element_type]).astype(np.float32, copy=False)


def narrow(values: Array, element_type: ElementType.ValueType) -> npt.NDArray[Any]:
    """Return float32 values in a payload's dtype, rounded to the nearest, ties to even; too large becomes Inf."""
    with np.errstate(over="ignore"):
        return values.astype(_DTYPES[element_type], copy=False)


def square_sum(values: npt.NDArray[Any]) -> float:
    """Return the sum of squares in float64. It is finite exactly when every value is (float32 squared can not
    overflow)."""
    total = 0.0
    for block in _blocks(values):
        wide = _scratch.wide[: block.size]
        wide[:] = block
        total += float(np.dot(wide, wide))
    return total


def norm(arrays: Arrays) -> float:
    """Return the L2 norm over all tensors; NaN or Inf when a value is."""
    return float(np.sqrt(sum(square_sum(array) for array in arrays.values())))


def encode(
    arrays: Arrays,
    element_type: ElementType.ValueType,
    payload: Path,
    *,
    roles: Mapping[str, TensorRole.ValueType] | None = None,
    adapter_config: str = "",
) -> Manifest:
    """Write the arrays' payload to a file, block by block, and return its manifest with the digest.

    Args:
        arrays: float32, by name; any shape of at most 8 dimensions.
        element_type: What the payload holds.
        payload: Written whole and synced, or not at all.
        roles: By name; from the PEFT name where omitted.
        adapter_config: For version 0, the PEFT configuration as JSON.

    Raises:
        FsllmError: NOT_FINITE, naming the tensor: a value is NaN or Inf, or too large for ``element_type``. DISK_FULL.

    """
    shapes = {name: array.shape for name, array in arrays.items()}
    return _write(shapes, lambda name: arrays[name], element_type, payload, roles or {}, adapter_config)


def decode(manifest: Manifest, payload: Path) -> dict[str, Array]:
    """Return float32 arrays, by name, from a valid manifest and its payload file.

    Raises:
        FsllmError: STATE_CORRUPT: the file's length is not the manifest's.

    """
    out: dict[str, Array] = {}
    with map_payload(manifest, payload) as raw:
        for name, element_type, shape, piece in _pieces(manifest, raw):
            array = np.empty(shape, dtype=np.float32)
            flat = array.reshape(-1)
            stored = piece.view(_DTYPES[element_type])
            for start in range(0, flat.size, BLOCK):
                flat[start : start + BLOCK] = stored[start : start + BLOCK]
            out[name] = array
    return out


def measure(manifest: Manifest, payload: Path) -> float:
    """Return the payload's L2 norm, computed in the same pass that shows that every value is finite.

    Raises:
        UpdateRejected: NOT_FINITE, naming the tensor.
        FsllmError: STATE_CORRUPT: the file's length is not the manifest's.

    """
    total = 0.0
    with map_payload(manifest, payload) as raw:
        for name, element_type, _, piece in _pieces(manifest, raw):
            squares = square_sum(piece.view(_DTYPES[element_type]))
            if not np.isfinite(squares):
                raise _not_finite(name, "holds NaN or Inf")
            total += squares
    return float(np.sqrt(total))


@contextmanager
def map_payload(manifest: Manifest, payload: Path) -> Iterator[npt.NDArray[np.uint8]]:
    """Map a payload file as bytes of shape (payload_bytes,), read-only.

    Raises:
        FsllmError: STATE_CORRUPT: the file's length is not the manifest's.

    """
    size = payload.stat().st_size
    if size != manifest.payload_bytes:
        raise FsllmError("STATE_CORRUPT", f"{payload} has {size} bytes; its manifest states {manifest.payload_bytes}")
    # An empty file can not be mapped.
    yield np.memmap(payload, dtype=np.uint8, mode="r") if size else np.empty(0, dtype=np.uint8)


def from_safetensors(
    source: Path,
    element_type: ElementType.ValueType,
    payload: Path,
    extra: Callable[[Mapping[str, tuple[int, ...]]], Mapping[str, Array]] = lambda shapes: {},
) -> Manifest:
    """Write a safetensors file's tensors as a payload, one tensor in memory at a time, and return the manifest.

    Roles come from the names; the metadata key ``adapter_config`` goes into the manifest. ``extra`` gives tensors to
    add, from the shapes of the file's.

    Raises:
        FsllmError: STATE_CORRUPT: not a safetensors file, or a tensor that is not floating point. NOT_FINITE, naming
            the tensor. DISK_FULL.

    """
    with ExitStack() as stack:
        try:
            file = stack.enter_context(safetensors.safe_open(source, "numpy"))
        except safetensors.SafetensorError as error:
            raise FsllmError("STATE_CORRUPT", f"{source} is not a safetensors file: {error}") from error
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        for name, piece in slices.items():
            if piece.get_dtype() not in ("F32", "F16", "BF16"):
                raise FsllmError("STATE_CORRUPT", f"Tensor {name!r} of {source} is {piece.get_dtype()}, not F32")
        shapes = {name: tuple(piece.get_shape()) for name, piece in slices.items()}
        added = extra(shapes)
        return _write(
            shapes | {name: array.shape for name, array in added.items()},
            lambda name: (
                added[name] if name in added else np.asarray(file.get_tensor(name)).astype(np.float32, copy=False)
            ),
            element_type,
            payload,
            {},
            (file.metadata() or {}).get(ADAPTER_CONFIG, ""),
        )


def save_arrays(
    arrays: Arrays, target: Path, *, metadata: Mapping[str, str] | None = None, durable: bool = True
) -> None:
    """Write float32 arrays as a safetensors file, whole or not at all. ``durable``: as for ``files.replacing``.

    Raises:
        Unavailable: DISK_FULL.

    """
    # safetensors writes the raw buffer: a transposed array would be stored scrambled, without an error.
    dense = {name: np.ascontiguousarray(array).reshape(array.shape) for name, array in arrays.items()}
    with replacing(target, durable=durable) as fresh:
        safetensors_numpy.save_file(dense, fresh, metadata=dict(metadata or {}))


def load_arrays(source: Path) -> dict[str, Array]:
    """Return a safetensors file's tensors as float32.

    Raises:
        FsllmError: STATE_CORRUPT: not a safetensors file.

    """
    try:
        arrays = safetensors_numpy.load_file(source)
    except safetensors.SafetensorError as error:
        raise FsllmError("STATE_CORRUPT", f"{source} is not a safetensors file: {error}") from error
    return {name: array.astype(np.float32, copy=False) for name, array in arrays.items()}


def _write(
    shapes: Mapping[str, tuple[int, ...]],
    load: Callable[[str], Array],
    element_type: ElementType.ValueType,
    payload: Path,
    roles: Mapping[str, TensorRole.ValueType],
    adapter_config: str,
) -> Manifest:
    manifest = describe(
        ((name, shape, roles.get(name, role_of(name))) for name, shape in shapes.items()), element_type, adapter_config
    )
    digest = PayloadDigest(manifest)
    with replacing(payload) as fresh, fresh.open("wb") as file:
        for spec in manifest.tensors:
            for block in _blocks(load(spec.name)):
                stored = narrow(block, element_type)
                if not np.isfinite(square_sum(stored)):
                    whole = np.isfinite(square_sum(block))
                    raise _not_finite(
                        spec.name, f"is too large for {dtype_of(element_type)}" if whole else "holds NaN or Inf"
                    )
                data = stored.view(np.uint8).data
                digest.update(data)
                file.write(data)
    manifest.digest = digest.digest()
    return manifest


def _pieces(
    manifest: Manifest, raw: npt.NDArray[np.uint8]
) -> Iterator[tuple[str, ElementType.ValueType, tuple[int, ...], npt.NDArray[np.uint8]]]:
    """Yield name, element type, shape and the bytes of each tensor, copied when they are not aligned to their width."""
    at = 0
    for spec in manifest.tensors:
        length = byte_count(spec)
        yield spec.name, spec.element_type, tuple(spec.shape), raw[at : at + length]
        at += length


def _blocks(values: npt.NDArray[Any]) -> Iterator[npt.NDArray[Any]]:
    """Yield the values in row-major order, flat, BLOCK at a time; views unless the array is not contiguous."""
    flat = np.ascontiguousarray(values).reshape(-1)
    for start in range(0, flat.size, BLOCK):
        yield flat[start : start + BLOCK]


def _not_finite(name: str, what: str) -> UpdateRejected:
    return UpdateRejected("NOT_FINITE", f"Tensor {name!r} {what}")


__all__ = [
    "ADAPTER_CONFIG",
    "BLOCK",
    "Array",
    "Arrays",
    "decode",
    "dtype_of",
    "element_count",
    "encode",
    "from_safetensors",
    "load_arrays",
    "map_payload",
    "measure",
    "narrow",
    "norm",
    "save_arrays",
    "square_sum",
    "widen",
]
