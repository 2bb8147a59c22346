"""What a run of the noop algorithm must give, computed here from the run's record and nothing of the server's."""

import zlib
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from fsllm.v1.tensors_pb2 import Manifest
from fsllm_common.tensors.manifest import PayloadDigest

Array = npt.NDArray[np.float32]

SCALE: Final = np.float32(0.02)


def version_zero(plan: Mapping[str, Any]) -> Array:
    """Return version 0 as one flat array: normal numbers from the plan's seed, tensor by tensor."""
    synthetic = plan["algorithm"]["synthetic"]
    elements, tensors = round(synthetic["mebibytes"] * 2**18), synthetic["tensors"]
    generator = np.random.Generator(np.random.PCG64(plan["seed"]))
    sizes = [elements // tensors + (at < elements % tensors) for at in range(tensors)]
    return np.concatenate([generator.standard_normal(size, dtype=np.float32) * SCALE for size in sizes])


def delta(site: str, round_: int, size: int) -> Array:
    """Return what a site sends in a round: one number everywhere."""
    return np.full(size, (1 + zlib.crc32(f"{site}/{round_}".encode()) % 64) / 64, dtype=np.float32)


def following(version: Array, round_: int, contributions: Sequence[Mapping[str, Any]]) -> Array:
    """Return the next version: the weighted sum of the deltas in float32, by site, added to the version."""
    mean = np.zeros_like(version)
    for one in sorted(contributions, key=lambda one: str(one["member"])):
        mean += delta(one["member"], round_, version.size) * np.float32(one["weight"])
    return version + mean


def digest(values: Array, manifest: Manifest) -> str:
    """Return the digest of a payload with the tensors of ``manifest``."""
    hasher = PayloadDigest(manifest)
    hasher.update(values.view(np.uint8).data)
    return hasher.hexdigest()


def replay(run: Mapping[str, Any], manifest: Manifest) -> tuple[Array, list[str]]:
    """Recompute every version of a run as ``fsllm run show --json`` records it.

    Args:
        run: The record.
        manifest: Of any of its versions: all have the same tensors.

    Returns:
        The last version, and what is wrong: a digest of a version or of a contribution that is another.

    """
    wrong = []
    version = version_zero(run["plan"])
    for commit in run["commits"]:
        round_, contributions = commit["round"], commit["contributions"]
        if round_:
            version = following(version, round_, contributions)
            for one in contributions:
                if one["digest"] != digest(delta(one["member"], round_, version.size), manifest):
                    wrong.append(f"round {round_}: the contribution of {one['member']} is another")
        if commit["digest"] != digest(version, manifest):
            wrong.append(f"version {round_} is another than its contributions give")
    return version, wrong
