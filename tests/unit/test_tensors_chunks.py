"""The framing by hand is the generated encoder's, byte for byte; the parser understands what the generated one does."""

from pathlib import Path

import pytest
from crc32c import crc32c
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from fsllm.v1.control_pb2 import ExportRunResponse
from fsllm.v1.federation_pb2 import DownloadResponse, UploadBegin, UploadRequest
from fsllm.v1.tensors_pb2 import Chunk, Manifest
from fsllm_common.errors import FsllmError, Unavailable
from fsllm_common.tensors.chunks import CHUNK, Piece, frame_chunk, parse_download, parse_upload, read_chunks

offsets = st.integers(0, 2**64 - 1) | st.sampled_from([0, 127, 128, 2**14, 2**32, 2**63])
payloads = st.binary(max_size=300) | st.integers(0, 3).map(lambda n: bytes(16_380 + n))


@given(offsets, payloads)
def test_the_frame_is_the_generated_encoders(offset: int, data: bytes) -> None:
    chunk = Chunk(offset=offset, crc32c=crc32c(data), data=data)
    frame = frame_chunk(offset, memoryview(data))
    for kind in (UploadRequest, DownloadResponse, ExportRunResponse):
        assert frame == kind(chunk=chunk).SerializeToString()
    assert parse_upload(frame) == parse_download(frame) == Piece(offset, memoryview(data))


def test_a_checksum_of_zero_is_left_out_by_both() -> None:
    data = b""
    assert crc32c(data) == 0
    assert frame_chunk(5, data) == UploadRequest(chunk=Chunk(offset=5)).SerializeToString()
    zero = b"\xab\x9b\xe0\x9b"  # the only four bytes whose CRC-32C is 0
    assert crc32c(zero) == 0
    assert frame_chunk(5, zero) == UploadRequest(chunk=Chunk(offset=5, data=zero)).SerializeToString()
    assert parse_upload(frame_chunk(5, zero)) == Piece(5, memoryview(zero))


def test_a_full_chunk_keeps_its_bytes_and_is_not_copied() -> None:
    data = bytes(range(256)) * (CHUNK // 256)
    frame = frame_chunk(3 * CHUNK, data)
    assert frame == DownloadResponse(chunk=Chunk(offset=3 * CHUNK, crc32c=crc32c(data), data=data)).SerializeToString()
    piece = parse_download(frame)
    assert isinstance(piece, Piece)
    assert piece.data.obj is frame


def test_other_kinds_come_back_as_messages() -> None:
    begin = UploadBegin(order_id="o", round=3)
    assert parse_upload(UploadRequest(begin=begin).SerializeToString()) == begin
    manifest = Manifest(payload_bytes=3)
    assert parse_download(DownloadResponse(manifest=manifest).SerializeToString()) == manifest
    assert parse_download(ExportRunResponse(manifest=manifest).SerializeToString()) == manifest


def test_fields_in_another_order_are_still_a_chunk() -> None:
    data = b"abc"
    inner = b"\x1a\x03abc" + b"\x15" + crc32c(data).to_bytes(4, "little") + b"\x08\x07"
    assert parse_upload(b"\x12" + bytes([len(inner)]) + inner) == Piece(7, memoryview(data))


def understood(wire: bytes) -> UploadBegin | Piece | None:
    """What our parser makes of it; None when it refuses."""
    try:
        return parse_upload(wire)
    except Unavailable as error:
        if error.reason != "CHUNK_CORRUPT":
            raise
        return None


def expected(wire: bytes) -> UploadBegin | Piece | None:
    """What the generated decoder makes of it; None when it, or the checksum, refuses."""
    try:
        message = UploadRequest.FromString(wire)
    except DecodeError:
        return None
    match message.WhichOneof("kind"):
        case "begin":
            return message.begin
        case "chunk" if crc32c(message.chunk.data) == message.chunk.crc32c:
            return Piece(message.chunk.offset, memoryview(message.chunk.data))
        case _:
            return None


@given(st.binary(max_size=60) | st.binary(max_size=60).map(lambda b: b"\x12" + bytes([len(b)]) + b))
def test_any_bytes_are_understood_as_the_generated_decoder_does_or_refused(wire: bytes) -> None:
    assert understood(wire) == expected(wire)


def field(tag: int, data: bytes) -> bytes:
    return bytes((tag, len(data))) + data


CRC = b"\x15" + crc32c(b"abc").to_bytes(4, "little")
WHOLE = b"\x08\x07" + CRC + field(0x1A, b"abc")
HUGE = b"\x08" + b"\xff" * 9 + b"\x7f"  # a varint of 70 bits


@pytest.mark.parametrize(
    "wire",
    [
        b"\x12" + bytes([len(WHOLE) + 1]) + WHOLE,  # says more than there is
        b"\x12" + bytes([len(WHOLE) - 1]) + WHOLE,  # says less
        b"\x12" + bytes([len(WHOLE) - 5]) + WHOLE,  # ends where data begins
        field(0x12, WHOLE + b"\x20\x01"),  # an unknown field inside
        field(0x12, WHOLE) + b"\x18\x01",  # and one after
        field(0x12, WHOLE) + field(0x12, b"\x08\x09"),  # merged with a second
        field(0x12, CRC + b"\x1a\x02abc"),  # data shorter than what follows
        field(0x12, HUGE + CRC + field(0x1A, b"abc")),
        field(0x12, b"\x08" + b"\xff" * 10 + b"\x01" + CRC + field(0x1A, b"abc")),
        field(0x12, b""),
        field(0x12, WHOLE) + field(0x0A, b""),  # the other kind after it: the last one counts
    ],
)
def test_odd_frames_are_understood_as_the_generated_decoder_does(wire: bytes) -> None:
    assert understood(wire) == expected(wire)


@given(st.data(), offsets, st.binary(min_size=1, max_size=64))
def test_a_changed_bit_never_passes_as_other_data(data: st.DataObject, offset: int, payload: bytes) -> None:
    frame = bytearray(frame_chunk(offset, payload))
    at = data.draw(st.integers(0, len(frame) - 1))
    frame[at] ^= 1 << data.draw(st.integers(0, 7))
    parsed = understood(bytes(frame))
    # The offset is not under the checksum (a receiver compares it with where it stands), nor is a field's number: a
    # chunk without a checksum and without data is whole.
    if isinstance(parsed, Piece):
        assert bytes(parsed.data) in (payload, b"")


@given(offsets, st.binary(min_size=1, max_size=64), st.integers(0, 80))
def test_a_cut_frame_is_refused(offset: int, payload: bytes, length: int) -> None:
    frame = frame_chunk(offset, payload)
    with pytest.raises(FsllmError) as caught:
        parse_upload(frame[: length % len(frame)])
    assert caught.value.reason == "CHUNK_CORRUPT"


def test_a_chunk_that_is_too_large_is_refused() -> None:
    with pytest.raises(FsllmError, match="at most"):
        parse_upload(frame_chunk(0, bytes(CHUNK + 1)))


@pytest.mark.parametrize("size", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK])
@pytest.mark.parametrize("offset", [0, 1, CHUNK])
def test_a_file_is_read_in_contiguous_full_chunks_from_the_offset(tmp_path: Path, size: int, offset: int) -> None:
    content = (bytes(range(251)) * (size // 251 + 1))[:size]
    path = tmp_path / "payload"
    path.write_bytes(content)
    if offset > size:
        with pytest.raises(FsllmError) as caught:
            next(read_chunks(path, offset))
        assert caught.value.reason == "OFFSET_OUT_OF_RANGE"
        return
    pieces = [parse_download(frame) for frame in read_chunks(path, offset)]
    at = offset
    for piece in pieces:
        assert isinstance(piece, Piece)
        assert piece.offset == at
        assert len(piece.data) == min(CHUNK, size - at)
        at += len(piece.data)
    assert at == size
    assert b"".join(bytes(p.data) for p in pieces if isinstance(p, Piece)) == content[offset:]
