"""What must hold of any bytes that arrive: the parser by hand is protobuf's, and what is refused is refused by name.

``fuzz.py`` feeds these from atheris, ``test_fuzz_corpus.py`` from the committed corpus and from hypothesis. The first
byte of an input chooses the target.
"""

import contextlib

from crc32c import crc32c
from google.protobuf.message import DecodeError

from fsllm.v1.control_pb2 import ExportRunResponse
from fsllm.v1.federation_pb2 import AttachRequest, DownloadResponse, UploadBegin, UploadRequest
from fsllm.v1.tensors_pb2 import Chunk, Manifest, ManifestPart
from fsllm_common.errors import FsllmError, Refused, UpdateRejected
from fsllm_common.tensors.chunks import CHUNK, Piece, parse_download, parse_upload
from fsllm_common.tensors.manifest import byte_count, canonical_text, fits, validate
from fsllm_common.tensors.parts import PART, ManifestReader, split_manifest
from fsllm_server.service.screening import screen_attach, screen_begin


def _refused(error: FsllmError, reason: str) -> None:
    """Whoever is refused is told why, in words that can be shown."""
    assert error.reason == reason
    assert error.message.isprintable()


def _chunk_as_protobuf_sees_it(chunk: Chunk) -> Piece | None:
    """Return what a chunk must be understood as; None when it must be refused."""
    good = len(chunk.data) <= CHUNK and crc32c(chunk.data) == chunk.crc32c
    return Piece(chunk.offset, memoryview(chunk.data)) if good else None


def upload(wire: bytes) -> None:
    """``parse_upload`` gives what protobuf's parser gives, or refuses with CHUNK_CORRUPT."""
    try:
        found: UploadBegin | ManifestPart | Piece | None = parse_upload(wire)
    except FsllmError as error:
        _refused(error, "CHUNK_CORRUPT")
        found = None
    try:
        message = UploadRequest.FromString(wire)
    except DecodeError:
        assert found is None
        return
    kind = message.WhichOneof("kind")
    if kind == "chunk":
        assert found == _chunk_as_protobuf_sees_it(message.chunk)
    else:
        assert found == (getattr(message, kind) if kind else None)


def download(wire: bytes) -> None:
    """``parse_download`` likewise, for both messages that have its form."""
    try:
        found: Manifest | ManifestPart | Piece | None = parse_download(wire)
    except FsllmError as error:
        _refused(error, "CHUNK_CORRUPT")
        found = None
    for form in (DownloadResponse, ExportRunResponse):
        try:
            message = form.FromString(wire)
        except DecodeError:
            assert found is None
            continue
        kind = message.WhichOneof("kind")
        if kind == "chunk":
            assert found == _chunk_as_protobuf_sees_it(message.chunk)
        else:
            assert found == (getattr(message, kind) if kind else None)


def manifest(wire: bytes) -> None:
    """A manifest is valid or refused with MANIFEST_INVALID; a valid one has a digest's text and survives the wire."""
    try:
        message = Manifest.FromString(wire)
    except DecodeError:
        return
    try:
        validate(message)
    except UpdateRejected as error:
        _refused(error, "MANIFEST_INVALID")
        return
    lines = canonical_text(message).split(b"\n")
    assert len(lines) == len(message.tensors) + 2
    assert all(line.count(b"\t") == 3 for line in lines[:-2])
    assert message.payload_bytes == sum(byte_count(spec) for spec in message.tensors)
    copy = Manifest.FromString(message.SerializeToString())
    assert ManifestReader().take(copy) == message
    message.ClearField("adapter_config")
    if message.tensors:
        with contextlib.suppress(UpdateRejected):
            fits(copy, message, message.tensors[0].element_type)


def parts(wire: bytes) -> None:
    """Parts in any order and number give a manifest of at most the limits, or MANIFEST_INVALID."""
    reader = ManifestReader()
    at = 0
    while at < len(wire):
        size = 1 + wire[at]
        piece, at = wire[at + 1 : at + size], at + size
        try:
            message = Manifest.FromString(piece) if size % 2 else ManifestPart.FromString(piece)
            whole = reader.take(message)
        except DecodeError:
            continue
        except UpdateRejected as error:
            _refused(error, "MANIFEST_INVALID")
            return
        if whole is not None:
            first, rest = split_manifest(whole)
            assert not first.tensor_count
            assert not rest
            assert whole.ByteSize() <= PART


def words(wire: bytes) -> None:
    """What passes the screening is printable and small; what does not is refused with MESSAGE_INVALID."""
    with contextlib.suppress(DecodeError, Refused):
        screen_begin(UploadBegin.FromString(wire))
    try:
        message = AttachRequest.FromString(wire)
        screen_attach(message)
    except DecodeError:
        return
    except Refused as error:
        _refused(error, "MESSAGE_INVALID")
        return
    answer = message.answer
    said = (message.hello.software_version, answer.declined.message, answer.failed.reason, message.progress.activity)
    assert all(text.isprintable() for text in said)
    assert all(metric.name.isprintable() for metric in (*answer.done.metrics, *message.progress.metrics))


def _varint(value: int, length: int) -> bytes:
    """Return a varint of at least ``length`` bytes: protobuf allows more than are needed, up to a limit."""
    out = bytearray()
    while value > 0x7F or len(out) + 1 < length:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def crafted(wire: bytes) -> None:
    """The first two for chunks with the right checksum, which chance does not find, in every form of writing them."""
    head, data = wire[:8].ljust(8, b"\0"), wire[8:]
    lengths = [byte % 12 for byte in head[:3]]
    offset = int.from_bytes(head[3:7]) << head[3] % 40
    fields = [
        b"\x08" + _varint(offset, lengths[0]),
        b"\x15" + crc32c(data).to_bytes(4, "little"),
        b"\x1a" + _varint(len(data), lengths[1]) + data,
        b"\x20\x01",  # a field that is not there
    ]
    orders = (
        (0, 1, 2),
        (1, 2),
        (2, 1, 0),
        (0, 1, 2, 3),
        (3, 0, 1, 2),
        (0, 1, 1, 2),
        (0, 0, 1, 2),
        (0, 1, 2, 2),
        (0, 1),
    )
    inner = b"".join(fields[at] for at in orders[head[7] % len(orders)])
    frame = b"\x12" + _varint(len(inner), lengths[2]) + inner
    for whole in (frame, frame + frame, frame[:-1], frame + b"\0"):
        upload(whole)
        download(whole)


TARGETS = (upload, download, manifest, parts, words, crafted)


def one_input(data: bytes) -> None:
    """Check one input."""
    if data:
        TARGETS[data[0] % len(TARGETS)](data[1:])
