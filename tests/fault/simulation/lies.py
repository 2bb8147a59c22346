"""What a member may try: each lie with the reasons that must answer it. None may ever be recorded."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from fsllm.v1.federation_pb2 import Order, UploadBegin, UploadRequest
from fsllm.v1.tensors_pb2 import ELEMENT_TYPE_BFLOAT16, ELEMENT_TYPE_FLOAT32, Chunk, Manifest
from fsllm_common.tensors.chunks import frame_chunk
from fsllm_common.tensors.manifest import WIRE_TYPES, PayloadDigest, describe, role_of
from simulation import arithmetic
from simulation.seams import CHUNK

ELEMENT = {"fp32": 4, "fp16": 2, "bf16": 2}


@dataclass(frozen=True)
class Update:
    """What an Upload call sends: the announcement, and then the frames of the chunks."""

    begin: UploadBegin
    payload: bytes
    frames: tuple[bytes, ...] = ()
    """Instead of the payload's chunks."""
    first: bytes | None = None
    """Instead of the announcement."""
    honest: bool = False

    @property
    def opening(self) -> bytes:
        return self.first if self.first is not None else UploadRequest(begin=self.begin).SerializeToString()

    def chunks(self, offset: int) -> Sequence[bytes]:
        return self.frames or frames(self.payload, offset)


def frames(payload: bytes, offset: int = 0) -> list[bytes]:
    return [frame_chunk(at, payload[at : at + CHUNK]) for at in range(offset, len(payload), CHUNK)]


def describe_arrays(arrays: dict[str, arithmetic.Array], kind: str) -> tuple[Manifest, bytes]:
    """Return an honest manifest and payload."""
    payload = arithmetic.on_the_wire(arithmetic.flat(arrays), kind)
    named = ((name, array.shape, role_of(name)) for name, array in arrays.items())
    manifest = describe(named, WIRE_TYPES[kind])  # type: ignore[index]
    digest = PayloadDigest(manifest)
    digest.update(payload)
    manifest.digest = digest.digest()
    return manifest, payload


def announce(order: Order, manifest: Manifest, examples: int) -> UploadBegin:
    return UploadBegin(
        order_id=order.order_id,
        run_id=order.run_id,
        round=order.round,
        base_digest=order.base.digest,
        manifest=manifest,
        examples=examples,
        tokens=7 * examples,
        steps=1,
    )


def _of(change: Callable[[dict[str, arithmetic.Array]], None]) -> "Lie":
    """Return a lie about values: an honest description of other arrays."""

    def lie(update: Update, kind: str) -> Update:
        arrays = arithmetic.numbers("a lie", 0.01)
        change(arrays)
        with np.errstate(over="ignore"):
            manifest, payload = describe_arrays(arrays, kind)
        return Update(_with(update.begin, manifest=manifest), payload)

    return lie


def _with(begin: UploadBegin, **changes: object) -> UploadBegin:
    changed = UploadBegin()
    changed.CopyFrom(begin)
    for name, value in changes.items():
        if isinstance(value, Manifest):
            changed.manifest.CopyFrom(value)
        else:
            setattr(changed, name, value)
    return changed


def _manifest(change: Callable[[Manifest], object]) -> "Lie":
    def lie(update: Update, kind: str) -> Update:
        begin = _with(update.begin)
        change(begin.manifest)
        return Update(begin, update.payload)

    return lie


def _begin(**changes: object) -> "Lie":
    return lambda update, kind: Update(_with(update.begin, **changes), update.payload)


def _nan(arrays: dict[str, arithmetic.Array]) -> None:
    arrays["y.lora_A.weight"][1, 2] = np.nan


def _infinite(arrays: dict[str, arithmetic.Array]) -> None:
    arrays["x.lora_B.weight"][0, 0] = -np.inf


def _rename(manifest: Manifest) -> None:
    manifest.tensors[0].name = "w.lora_A.weight"


def _reshape(manifest: Manifest) -> None:
    manifest.tensors[0].shape[:] = reversed(manifest.tensors[0].shape)


def _retype(manifest: Manifest) -> None:
    other = manifest.tensors[0].element_type == ELEMENT_TYPE_FLOAT32
    for spec in manifest.tensors:
        spec.element_type = ELEMENT_TYPE_BFLOAT16 if other else ELEMENT_TYPE_FLOAT32
    manifest.payload_bytes = sum(int(np.prod(spec.shape)) for spec in manifest.tensors) * (2 if other else 4)


def _digest(manifest: Manifest) -> None:
    manifest.digest = bytes(32)


def _bytes_changed(update: Update, kind: str) -> Update:
    # The last ones: the first may be held already.
    return Update(update.begin, update.payload[:-1] + bytes([update.payload[-1] ^ 1]))


def _bad_checksum(update: Update, kind: str) -> Update:
    whole = frames(update.payload)
    chunk = Chunk(offset=0, crc32c=1, data=update.payload[:CHUNK])
    return Update(update.begin, update.payload, (UploadRequest(chunk=chunk).SerializeToString(), *whole[1:]))


def _framed(change: Callable[[list[bytes], bytes], list[bytes]]) -> "Lie":
    return lambda update, kind: Update(
        update.begin, update.payload, tuple(change(frames(update.payload), update.payload))
    )


Lie = Callable[[Update, str], Update]

LIES: dict[str, tuple[Lie, frozenset[str]]] = {
    name: (lie, frozenset(reasons.split()))
    for name, (lie, reasons) in {
        "NaN": (_of(_nan), "NOT_FINITE"),
        "Inf": (_of(_infinite), "NOT_FINITE"),
        "another digest": (_manifest(_digest), "DIGEST_MISMATCH"),
        "other bytes": (_bytes_changed, "DIGEST_MISMATCH"),
        "another base": (_begin(base_digest=b"\1" * 32), "BASE_STALE"),
        "no base": (_begin(base_digest=b""), "BASE_STALE"),
        "a future round": (_begin(round=99), "NOT_WANTED"),
        "the round before": (_begin(round=0), "ROUND_CLOSED"),
        "another run": (_begin(run_id="0" * 12), "NOT_WANTED"),
        "another order": (_begin(order_id="x.1.train.site-a.1"), "NOT_WANTED"),
        "another name": (_manifest(_rename), "MANIFEST_INVALID"),
        "another shape": (_manifest(_reshape), "MANIFEST_INVALID"),
        "another type": (_manifest(_retype), "MANIFEST_INVALID"),
        "a tensor less": (_manifest(lambda manifest: manifest.tensors.pop()), "MANIFEST_INVALID"),
        "a larger payload": (
            _manifest(lambda manifest: setattr(manifest, "payload_bytes", 1 << 40)),
            "MANIFEST_INVALID",
        ),
        "many examples": (_begin(examples=1 << 60), "MANIFEST_INVALID"),
        # OK when an earlier attempt has left the missing chunk there: the digest tells that the whole is right.
        "a gap": (_framed(lambda whole, payload: whole[1:]), "OFFSET_OUT_OF_RANGE OK"),
        "a chunk twice": (_framed(lambda whole, payload: [whole[0], *whole]), "OFFSET_OUT_OF_RANGE"),
        "a small chunk": (
            _framed(lambda whole, payload: [frame_chunk(0, payload[: CHUNK - 1])]),
            "MANIFEST_INVALID",
        ),
        "a chunk more": (
            _framed(lambda whole, payload: [*whole, frame_chunk(len(payload), b"x")]),
            "MANIFEST_INVALID OFFSET_OUT_OF_RANGE",
        ),
        "a chunk less": (_framed(lambda whole, payload: whole[:-1]), "OFFSET_OUT_OF_RANGE"),
        "a wrong checksum": (_bad_checksum, "CHUNK_CORRUPT"),
        "no message": (_framed(lambda whole, payload: [b"\xff\xff\xff"]), "CHUNK_CORRUPT MESSAGE_INVALID"),
        "begin twice": (
            lambda update, kind: Update(update.begin, update.payload, (update.opening,)),
            "MANIFEST_INVALID",
        ),
        "no begin": (
            lambda update, kind: Update(update.begin, update.payload, first=frames(update.payload)[0]),
            "MANIFEST_INVALID",
        ),
    }.items()
}
TOO_LARGE = _of(lambda arrays: arrays.update({name: array * 1e5 for name, array in arrays.items()}))
"""Answered with NORM_TOO_LARGE by a plan that bounds the norm."""
