"""A manifest in several messages: what is larger than a chunk travels in parts, so that no message has to be large.

100,000 tensors with PEFT's names take 8 MB. The receiver knows from the first message how many tensors will come, and
stops reading as soon as they are more, or larger, than it allows.
"""

from typing import Final

from fsllm.v1.tensors_pb2 import Manifest, ManifestPart
from fsllm_common.errors import UpdateRejected
from fsllm_common.tensors.manifest import MAX_TENSORS

PART: Final = 1 << 20
"""Bytes of a message from which on a sender splits."""

MAX_MANIFEST: Final = 32 << 20
"""Bytes of a whole manifest."""


def split_manifest(manifest: Manifest) -> tuple[Manifest, list[ManifestPart]]:
    """Return the first message of a manifest and those that follow; the manifest itself and none when it is small."""
    size = manifest.ByteSize()
    if size <= PART:
        return manifest, []
    first = Manifest(
        payload_bytes=manifest.payload_bytes,
        digest=manifest.digest,
        adapter_config=manifest.adapter_config,
        tensor_count=len(manifest.tensors),
    )
    step = max(1, len(manifest.tensors) * PART // (2 * size))
    return first, [
        part
        for start in range(0, len(manifest.tensors), step)
        for part in _halved(ManifestPart(tensors=manifest.tensors[start : start + step]))
    ]


class ManifestReader:
    """Puts a manifest together as its messages come."""

    def __init__(self) -> None:
        self._manifest: Manifest | None = None
        self._count = 0
        self._bytes = 0

    def take(self, message: Manifest | ManifestPart) -> Manifest | None:
        """Take the next message; return the manifest once it is whole (the first message itself, completed).

        It has not been validated then.

        Raises:
            UpdateRejected: MANIFEST_INVALID: a part that was not announced, too many tensors, or too many bytes.

        """
        if isinstance(message, Manifest):
            self._manifest, self._count, self._bytes = message, message.tensor_count or len(message.tensors), 0
        manifest = self._manifest
        if manifest is None:
            raise _invalid("A part of a manifest came before its beginning")
        self._bytes += message.ByteSize()
        if self._count > MAX_TENSORS or self._bytes > MAX_MANIFEST:
            raise _invalid(
                f"A manifest of {self._count} tensors, {self._bytes} bytes so far; at most {MAX_TENSORS} tensors and "
                f"{MAX_MANIFEST} bytes are allowed"
            )
        if isinstance(message, ManifestPart):
            if not message.tensors:
                raise _invalid("A part of a manifest is empty")
            manifest.tensors.extend(message.tensors)
        if len(manifest.tensors) > self._count:
            raise _invalid(f"The manifest has more tensors than the {self._count} that it states")
        if len(manifest.tensors) < self._count:
            return None
        manifest.ClearField("tensor_count")
        self._manifest = None
        return manifest


def _halved(part: ManifestPart) -> list[ManifestPart]:
    """Return a part in pieces that are small enough: its names may be longer than the manifest's are on average."""
    if part.ByteSize() <= PART or len(part.tensors) == 1:
        return [part]
    middle = len(part.tensors) // 2
    halves = part.tensors[:middle], part.tensors[middle:]
    return [piece for half in halves for piece in _halved(ManifestPart(tensors=half))]


def _invalid(message: str) -> UpdateRejected:
    return UpdateRejected("MANIFEST_INVALID", message)
