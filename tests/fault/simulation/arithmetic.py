"""What the sites train, and what a round must make of it: written down once more, in plain numpy.

Nothing here calls the reducers or the codecs. An update's payload is the sites' arrays, by name, each in the wire's
type; a version is base + rate x sum of share x delta, where each share, product and sum is rounded to float32.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from fsllm_common.plan import Plan

Array = npt.NDArray[np.float32]

SHAPES = {"x.lora_A.weight": (3, 17), "x.lora_B.weight": (19, 3), "y.lora_A.weight": (3, 5)}
ADAPTER_CONFIG = json.dumps({"peft_type": "LORA", "r": 3})
DTYPES: dict[str, np.dtype[Any]] = {
    "fp32": np.dtype("<f4"),
    "fp16": np.dtype("<f2"),
    "bf16": np.dtype(ml_dtypes.bfloat16),
}


def numbers(key: str, scale: float) -> dict[str, Array]:
    """Return one array a tensor, the same for the same key."""
    seed = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big")
    generator = np.random.Generator(np.random.PCG64(seed))
    return {
        name: generator.standard_normal(shape, dtype=np.float32) * np.float32(scale) for name, shape in SHAPES.items()
    }


def flat(arrays: Mapping[str, Array]) -> Array:
    """Return the tensors in the payload's order."""
    return np.concatenate([arrays[name].reshape(-1) for name in sorted(arrays)])


def on_the_wire(values: Array, element_type: str) -> bytes:
    """Return a payload."""
    return values.astype(DTYPES[element_type]).tobytes()


def from_the_wire(payload: bytes, element_type: str) -> Array:
    """Return a payload's values."""
    return np.frombuffer(payload, DTYPES[element_type]).astype(np.float32)


def shares(plan: Plan, counts: Sequence[tuple[int, int]], behind: Sequence[int]) -> list[float]:
    """Return the shares of updates of so many (examples, tokens), so many rounds behind."""
    cap = plan.algorithm.weight_cap
    weigh = {
        "examples": lambda examples, tokens: examples,
        "tokens": lambda examples, tokens: tokens,
        "uniform": lambda examples, tokens: 1,
        "capped": lambda examples, tokens: min(examples, cap),
    }[plan.algorithm.weighting]
    weights = [max(1, weigh(*count)) for count in counts]
    return [weight / sum(weights) * (1 + rounds) ** -0.5 for weight, rounds in zip(weights, behind, strict=True)]


def next_version(plan: Plan, base: Array, updates: Sequence[tuple[float, Array]]) -> Array:
    """Return the float32 master of the next version; updates sorted by member."""
    mean = np.zeros_like(base)
    for share, delta in updates:
        mean = mean + np.float32(share) * delta
    return base + np.float32(plan.algorithm.server_learning_rate) * mean
