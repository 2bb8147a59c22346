"""The noop algorithm's tensors: made up, of the plan's size, and with a closed form that a test can add up."""

import zlib
from pathlib import Path
from typing import Final

from fsllm.v1.tensors_pb2 import Manifest
from fsllm_common.plan import Plan
from fsllm_common.tensors.manifest import WIRE_TYPES

ADAPTER_CONFIG: Final = '{"peft_type": "SYNTHETIC"}'
_COLUMNS: Final = 256


def shapes(plan: Plan) -> dict[str, tuple[int, ...]]:
    """Return the synthetic tensors' shapes by name: ``tensors`` of them, ``mebibytes`` together in float32."""
    synthetic = plan.algorithm.synthetic
    elements = max(1, round(synthetic.mebibytes * 2**20 / 4))
    count = min(synthetic.tensors, elements)
    share, left = divmod(elements, count)
    sizes = [share + (1 if at < left else 0) for at in range(count)]
    return {
        f"synthetic.{at:05d}": (size // _COLUMNS, _COLUMNS) if size % _COLUMNS == 0 else (size,)
        for at, size in enumerate(sizes)
    }


def delta_value(site: str, round_: int) -> float:
    """Return what every element of a site's delta is: a multiple of 1/64 in (0, 1], exact in every wire type."""
    return (1 + zlib.crc32(f"{site}/{round_}".encode()) % 64) / 64


def write_version_zero(plan: Plan, payload: Path) -> Manifest:
    """Write version 0: normal numbers from the plan's seed, in float32.

    Raises:
        Unavailable: DISK_FULL.

    """
    import numpy as np  # here and below: the idle daemon holds no numpy

    from fsllm_common.tensors.arrays import encode

    generator = np.random.Generator(np.random.PCG64(plan.seed))
    arrays = {
        name: generator.standard_normal(shape, dtype=np.float32) * np.float32(0.02)
        for name, shape in shapes(plan).items()
    }
    return encode(arrays, WIRE_TYPES["fp32"], payload, adapter_config=ADAPTER_CONFIG)


def write_delta(plan: Plan, base: Manifest, value: float, payload: Path) -> Manifest:
    """Write a delta that is ``value`` everywhere. Nothing is synced: it can be made again at any time.

    Raises:
        Unavailable: DISK_FULL.

    """
    import numpy as np

    from fsllm_common.files import disk_errors
    from fsllm_common.tensors.arrays import BLOCK, narrow
    from fsllm_common.tensors.manifest import PayloadDigest, describe

    kind = WIRE_TYPES[plan.wire.element_type]
    manifest = describe(((t.name, tuple(t.shape), t.role) for t in base.tensors), kind)
    digest = PayloadDigest(manifest)
    piece = memoryview(narrow(np.full(BLOCK, value, dtype=np.float32), kind).view(np.uint8).data)
    with disk_errors(payload.parent), payload.open("wb") as file:
        left = manifest.payload_bytes
        while left:
            part = piece[: min(left, len(piece))]
            digest.update(part)
            file.write(part)
            left -= len(part)
    manifest.digest = digest.digest()
    return manifest
