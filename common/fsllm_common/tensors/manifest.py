"""The description of a tensor set: its canonical text and digest, and what a receiver demands of it.

protos/fsllm/v1/tensors.proto defines the format. No numpy here: daemons check manifests while they hold no arrays.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final, Literal

from blake3 import blake3

from fsllm.v1.tensors_pb2 import (
    ELEMENT_TYPE_BFLOAT16,
    ELEMENT_TYPE_FLOAT16,
    ELEMENT_TYPE_FLOAT32,
    TENSOR_ROLE_BASE_DELTA,
    TENSOR_ROLE_BASIS,
    TENSOR_ROLE_CONTROL,
    TENSOR_ROLE_CORANGE,
    TENSOR_ROLE_HEAD,
    TENSOR_ROLE_LORA_A,
    TENSOR_ROLE_LORA_B,
    TENSOR_ROLE_LORA_R,
    TENSOR_ROLE_MAGNITUDE,
    TENSOR_ROLE_OTHER,
    TENSOR_ROLE_PROMPT,
    TENSOR_ROLE_RANGE,
    TENSOR_ROLE_SCALAR,
    TENSOR_ROLE_SCALE,
    TENSOR_ROLE_TEST_MATRIX,
    ElementType,
    Manifest,
    TensorRole,
    TensorSpec,
)
from fsllm_common.errors import UpdateRejected

MAX_TENSORS: Final = 200_000
MAX_NAME: Final = 512
MAX_DIMENSIONS: Final = 8
MAX_PAYLOAD: Final = 1 << 40
MAX_ADAPTER_CONFIG: Final = 1 << 18
DIGEST_SIZE: Final = 32

WIDTH: Final[dict[ElementType.ValueType, int]] = {
    ELEMENT_TYPE_FLOAT32: 4,
    ELEMENT_TYPE_FLOAT16: 2,
    ELEMENT_TYPE_BFLOAT16: 2,
}
"""Bytes an element."""

_TEXT: Final[dict[ElementType.ValueType, str]] = {
    ELEMENT_TYPE_FLOAT32: "f32",
    ELEMENT_TYPE_FLOAT16: "f16",
    ELEMENT_TYPE_BFLOAT16: "bf16",
}

WIRE_TYPES: Final[dict[Literal["fp32", "fp16", "bf16"], ElementType.ValueType]] = {
    "fp32": ELEMENT_TYPE_FLOAT32,
    "fp16": ELEMENT_TYPE_FLOAT16,
    "bf16": ELEMENT_TYPE_BFLOAT16,
}
"""From the plan's ``wire.element_type``."""

_ALL_ROLES: Final = frozenset(TensorRole.values())

_NAME: Final = re.compile(r"[\x20-\x7e]{1,512}")

# What methods add (Algorithm.extra), then PEFT's state-dict names; the first that fits decides.
# lora_magnitude_vector is DoRA's, ia3_l IA3's.
_ROLES: Final = (
    (re.compile(r"^control/"), TENSOR_ROLE_CONTROL),
    (re.compile(r"^scalars/"), TENSOR_ROLE_SCALAR),
    (re.compile(r"^base_delta/"), TENSOR_ROLE_BASE_DELTA),
    (re.compile(r"^sketch/.*\.lora_O$"), TENSOR_ROLE_TEST_MATRIX),
    (re.compile(r"^sketch/.*\.lora_Y$"), TENSOR_ROLE_RANGE),
    (re.compile(r"^sketch/.*\.lora_Z$"), TENSOR_ROLE_CORANGE),
    (re.compile(r"^sketch/.*\.lora_Q$"), TENSOR_ROLE_BASIS),
    (re.compile(r"\blora_(embedding_)?A\b"), TENSOR_ROLE_LORA_A),
    (re.compile(r"\blora_(embedding_)?B\b"), TENSOR_ROLE_LORA_B),
    (re.compile(r"\blora_R\b"), TENSOR_ROLE_LORA_R),
    (re.compile(r"\blora_magnitude_vector\b"), TENSOR_ROLE_MAGNITUDE),
    (re.compile(r"\b(ia3_l|vera_lambda_[bd])\b"), TENSOR_ROLE_SCALE),
    (re.compile(r"\b(prompt_embeddings|prompt_encoder|prefix_encoder)\b"), TENSOR_ROLE_PROMPT),
    (re.compile(r"\b(modules_to_save|lm_head|classifier|score)\b"), TENSOR_ROLE_HEAD),
)


def role_of(name: str) -> TensorRole.ValueType:
    """Return the role of a tensor, from its name: PEFT's in a state dict, or one with a method's prefix."""
    return next((role for pattern, role in _ROLES if pattern.search(name)), TENSOR_ROLE_OTHER)


def element_count(spec: TensorSpec) -> int:
    """Return the number of elements: the product of the dimensions, 1 for a scalar."""
    count = 1
    for dimension in spec.shape:
        count *= dimension
    return count


def byte_count(spec: TensorSpec) -> int:
    """Return the tensor's length in the payload."""
    return element_count(spec) * WIDTH[spec.element_type]


def canonical_text(manifest: Manifest) -> bytes:
    """Return the text that the digest covers: a line per tensor, then an empty line. Defined for valid manifests."""
    lines = [
        f"{t.name}\t{_TEXT[t.element_type]}\t{','.join(map(str, t.shape))}\t{int(t.role)}\n" for t in manifest.tensors
    ]
    return "".join([*lines, "\n"]).encode("ascii")


def version_digest(parts: Sequence[tuple[str, str]]) -> str:
    """Return a version's digest, hexadecimal, from the names and digests of its parts (fsllm.v1.Version)."""
    if len(parts) == 1:
        return parts[0][1]
    return blake3("".join(f"{name}\t{digest}\n" for name, digest in parts).encode()).hexdigest()


def part_name(part: str, rank: int) -> str:
    """Return the name of a version's part as members of one rank get it (fsllm.v1.VersionPart)."""
    return f"{part}@{rank}"


def split_part_name(name: str) -> tuple[str, int]:
    """Return which part it is and of which rank; 0: it is the same for every rank."""
    part, _, rank = name.partition("@")
    return part, int(rank or 0)


class PayloadDigest:
    """The digest of a manifest and its payload, fed with the payload's bytes in order, in pieces of any size."""

    def __init__(self, manifest: Manifest) -> None:
        self._hash = blake3(canonical_text(manifest))

    def update(self, data: bytes | bytearray | memoryview) -> None:
        """Take the next bytes of the payload."""
        self._hash.update(data)

    def update_file(self, path: Path) -> None:
        """Take a whole file as the next bytes of the payload. It is mapped, not read into memory."""
        self._hash.update_mmap(path)

    def digest(self) -> bytes:
        """Return the 32 bytes for what has been fed so far."""
        return self._hash.digest()

    def hexdigest(self) -> str:
        """Return the digest as 64 hexadecimal digits."""
        return self._hash.hexdigest()


def payload_digest(manifest: Manifest, payload: Path) -> bytes:
    """Return the digest of a manifest and the payload that lies in a file."""
    digest = PayloadDigest(manifest)
    digest.update_file(payload)
    return digest.digest()


def describe(
    tensors: Iterable[tuple[str, tuple[int, ...], TensorRole.ValueType]],
    element_type: ElementType.ValueType,
    adapter_config: str = "",
) -> Manifest:
    """Return a manifest, sorted, with sizes but without its digest, for (name, shape, role) of each tensor."""
    specs = [
        TensorSpec(name=name, element_type=element_type, shape=shape, role=role)
        for name, shape, role in sorted(tensors, key=lambda t: t[0].encode())
    ]
    return Manifest(tensors=specs, payload_bytes=sum(map(byte_count, specs)), adapter_config=adapter_config)


def validate(manifest: Manifest) -> None:
    """Check a manifest that came from elsewhere: limits, order, types, and sizes that add up.

    Raises:
        UpdateRejected: MANIFEST_INVALID, naming the tensor.

    """
    if len(manifest.tensors) > MAX_TENSORS:
        raise _invalid(f"The manifest has {len(manifest.tensors)} tensors; at most {MAX_TENSORS} are allowed")
    if manifest.tensor_count:
        raise _invalid(f"The manifest is not whole: it states {manifest.tensor_count} tensors")
    if len(manifest.digest) != DIGEST_SIZE:
        raise _invalid(f"The manifest's digest has {len(manifest.digest)} bytes instead of {DIGEST_SIZE}")
    previous: str | None = None
    total = 0
    for spec in manifest.tensors:
        _validate_tensor(spec)
        if previous is not None and spec.name <= previous:
            what = "appears twice" if spec.name == previous else f"comes after {previous!r}: names must ascend"
            raise _invalid(f"Tensor {spec.name!r} {what}")
        previous = spec.name
        total += byte_count(spec)
        if total > MAX_PAYLOAD:
            raise _invalid(f"Tensor {spec.name!r} takes the payload past {MAX_PAYLOAD} bytes")
    if total != manifest.payload_bytes:
        raise _invalid(f"The manifest states {manifest.payload_bytes} payload bytes, but its tensors take {total}")
    _validate_adapter_config(manifest.adapter_config)


def fits(manifest: Manifest, base: Manifest, element_type: ElementType.ValueType) -> None:
    """Check a manifest that came from elsewhere by itself and against the base version: ``validate``, ``compatible``.

    Where the base has the wire's element type, which is the rule, its tensors are simply the same, and 100,000 of them
    are compared in a millisecond.

    Raises:
        UpdateRejected: MANIFEST_INVALID, naming the tensor.

    """
    if (
        len(manifest.tensors) == len(base.tensors)
        and manifest.payload_bytes == base.payload_bytes
        and len(manifest.digest) == DIGEST_SIZE
        and not (manifest.adapter_config or manifest.tensor_count)
        and {spec.element_type for spec in base.tensors[:1]} <= {element_type}  # all the others are of the same
        and _tensors_text(manifest) == _tensors_text(base)
    ):
        return
    validate(manifest)
    compatible(manifest, base, element_type)


def _tensors_text(manifest: Manifest) -> bytes:
    """Return the tensors as they are serialised: in front of the other fields, which are cut off."""
    rest = Manifest(payload_bytes=manifest.payload_bytes, digest=manifest.digest)
    return manifest.SerializeToString(deterministic=True).removesuffix(rest.SerializeToString(deterministic=True))


def compatible(manifest: Manifest, base: Manifest, element_type: ElementType.ValueType) -> None:
    """Check that a valid manifest has the base's tensors (names, shapes, roles), all of the plan's element type.

    Raises:
        UpdateRejected: MANIFEST_INVALID, naming the first tensor that differs.

    """
    ours = {spec.name: spec for spec in manifest.tensors}
    theirs = {spec.name: spec for spec in base.tensors}
    if missing := sorted(theirs.keys() - ours.keys()):
        raise _invalid(f"Tensor {missing[0]!r} of the base version is missing ({len(missing)} in all)")
    if extra := sorted(ours.keys() - theirs.keys()):
        raise _invalid(f"Tensor {extra[0]!r} is not in the base version ({len(extra)} such in all)")
    for name, spec in ours.items():
        if list(spec.shape) != list(theirs[name].shape):
            raise _invalid(f"Tensor {name!r} has shape {list(spec.shape)}; the base has {list(theirs[name].shape)}")
        if spec.role != theirs[name].role:
            raise _invalid(f"Tensor {name!r} has role {spec.role}; the base has {theirs[name].role}")
        if spec.element_type != element_type:
            got, wanted = _TEXT.get(spec.element_type, str(spec.element_type)), _TEXT[element_type]
            raise _invalid(f"Tensor {name!r} is {got}; the plan's wire.element_type is {wanted}")


def _validate_tensor(spec: TensorSpec) -> None:
    if not _NAME.fullmatch(spec.name):
        raise _invalid(f"Tensor name {spec.name[:80]!r} is not 1 to {MAX_NAME} characters of printable ASCII")
    if spec.element_type not in WIDTH:
        raise _invalid(f"Tensor {spec.name!r} has the unknown element type {spec.element_type}")
    if spec.role not in _ALL_ROLES:
        raise _invalid(f"Tensor {spec.name!r} has the unknown role {spec.role}")
    if len(spec.shape) > MAX_DIMENSIONS:
        raise _invalid(f"Tensor {spec.name!r} has {len(spec.shape)} dimensions; at most {MAX_DIMENSIONS} are allowed")


def _validate_adapter_config(text: str) -> None:
    if not text:
        return
    if len(text) > MAX_ADAPTER_CONFIG:
        raise _invalid(f"adapter_config has {len(text)} characters; at most {MAX_ADAPTER_CONFIG} are allowed")
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _invalid("adapter_config is not JSON") from error
    if not isinstance(config, dict):
        raise _invalid("adapter_config is not a JSON object")


def _invalid(message: str) -> UpdateRejected:
    return UpdateRejected("MANIFEST_INVALID", message)
