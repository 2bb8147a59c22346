"""Payloads of odd sizes, through everything: no tensor, one element, 100,000 tensors, more bytes than 32 bits count.

3 GiB in one tensor of bfloat16 take minutes and 20 GB of disk:
``FSLLM_TEST_HUGE=1 pytest tests/fault/test_odd_sizes.py -k gibibytes``.
"""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.system.harness import CALL_SECONDS, ServerProcess
from tests.system.peer import Peer, Tensors, read_payload
from tests.system.runs import await_done, expected, final, plan_for, submit
from tests.system.site_process import SiteProcess

from fsllm.v1 import control_pb2 as control
from fsllm.v1 import federation_pb2 as pb
from fsllm.v1.tensors_pb2 import (
    ELEMENT_TYPE_BFLOAT16,
    ELEMENT_TYPE_FLOAT32,
    TENSOR_ROLE_LORA_A,
    TENSOR_ROLE_OTHER,
)
from fsllm_common.errors import FsllmError
from fsllm_common.tensors.chunks import CHUNK, Piece, parse_download, parse_upload, read_chunks
from fsllm_common.tensors.manifest import PayloadDigest, describe, validate
from fsllm_common.tensors.parts import PART, ManifestReader, split_manifest
from fsllm_server.store.spools import Spools

GIB = 1 << 30
MANY = 100_000


def tensors(specs: list[tuple[str, tuple[int, ...]]], values: np.ndarray[Any, np.dtype[np.float32]]) -> Tensors:
    manifest = describe(((name, shape, TENSOR_ROLE_LORA_A) for name, shape in specs), ELEMENT_TYPE_FLOAT32)
    digest = PayloadDigest(manifest)
    digest.update(values.tobytes())
    manifest.digest = digest.digest()
    return Tensors(manifest, values.tobytes())


SIZES: dict[str, list[tuple[str, tuple[int, ...]]]] = {
    "no tensor": [],
    "tensors of no elements": [("a", (0,)), ("b", (3, 0, 7))],
    "a scalar": [("a", ())],
    "one element": [("a", (1, 1, 1, 1, 1, 1, 1, 1))],
    "a chunk and one element": [("a", (CHUNK // 4 + 1,))],
    "a chunk exactly": [("a", (CHUNK // 4,))],
    # 4.6 MB of manifest: more than one message may hold.
    "60,000 tensors of long names": [
        (f"base_model.model.model.layers.{at}.self_attn.q_proj.lora_A.weight", (1,)) for at in range(60_000)
    ],
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with ServerProcess(tmp_path_factory.mktemp("fsllm") / "server") as server:
        yield server


@pytest.mark.slow
@pytest.mark.parametrize("what", SIZES)
def test_over_the_wire(server: ServerProcess, what: str) -> None:
    specs = SIZES[what]
    elements = sum(int(np.prod(shape, dtype=np.int64)) for _, shape in specs)
    start = np.arange(elements, dtype=np.float32)
    zero, delta = tensors(specs, start), tensors(specs, np.full(elements, 0.5, np.float32))
    name = f"site-{list(SIZES).index(what)}"
    peer = Peer(server, server.enroll(name))
    run = submit(
        server,
        {
            "name": name,
            "rounds": 1,
            "model": {"name": "synthetic"},
            "algorithm": {"name": "noop"},
            "cohort": {"quorum": 1, "sites": [name]},
            "timing": {"gather_seconds": 0.01},
            "wire": {"element_type": "fp32"},
            "evaluate": {"every": 0},
        },
    )
    order = peer.join(zero)
    assert peer.download(order.base, run) == (zero.manifest, zero.payload)
    assert peer.deliver(order, delta).payload_bytes == 4 * elements
    await_done(server, run)
    np.testing.assert_array_equal(final(server, run), start + np.float32(0.5))
    assert "failed by a bug" not in server.log


@pytest.mark.slow
@pytest.mark.parametrize(("count", "mebibytes"), [(MANY, MANY * 4 / 2**20), (1, 4 / 2**20)])
def test_with_the_daemons(server: ServerProcess, tmp_path: Path, count: int, mebibytes: float) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "a", "completion": "b"}\n')
    with SiteProcess(server, tmp_path / f"daemon-{count}", data) as site:
        site.await_log("attached")
        synthetic = {"tensors": count, "mebibytes": mebibytes}
        algorithm = {"name": "noop", "weighting": "uniform", "synthetic": synthetic}
        run = submit(server, plan_for(site, rounds=1, algorithm=algorithm))
        done = await_done(server, run)
        assert [len(commit.contributions) for commit in done.commits] == [1, 1]
        last = final(server, run)
        assert last.shape == (count,)
        if count == 1:
            np.testing.assert_allclose(last, expected((site,), 1, mebibytes=mebibytes)[:1], atol=1e-6)
        # 2.6 MB of manifest: in parts, both ways.
        assert site.log.count('"event": "delivered"') == 2


def test_a_manifest_is_split_and_put_together_again() -> None:
    whole = tensors(SIZES["60,000 tensors of long names"], np.zeros(60_000, np.float32)).manifest
    whole.adapter_config = "{}"
    first, parts = split_manifest(whole)
    assert len(parts) > 4
    assert max(part.ByteSize() for part in parts) <= PART
    assert not first.tensors
    reader = ManifestReader()
    took = [reader.take(message) for message in (first, *parts)]
    assert took[:-1] == [None] * len(parts)
    assert took[-1] == whole
    validate(whole)
    # Long names among short ones.
    uneven = describe(
        [(f"{at:06d}" * (1 if at < 5000 else 80), (1,), TENSOR_ROLE_OTHER) for at in range(8000)],
        ELEMENT_TYPE_FLOAT32,
    )
    assert max(part.ByteSize() for part in split_manifest(uneven)[1]) <= PART
    small = tensors([("a", (1,))], np.zeros(1, np.float32)).manifest
    assert split_manifest(small) == (small, [])
    assert ManifestReader().take(small) is small


def sparse(path: Path, size: int, tail: bytes) -> None:
    """Make a file that ends with ``tail`` and has no other bytes on the disk."""
    with path.open("wb") as file:
        file.truncate(size - len(tail))
        file.seek(size - len(tail))
        file.write(tail)


@pytest.mark.parametrize("size", [2 * GIB + CHUNK + 2, 3 * GIB, 4 * GIB + 6, 9 * GIB + 10])
def test_offsets_beyond_32_bits(tmp_path: Path, size: int) -> None:
    """The last chunks of a huge payload, from a sender's file to the server's."""
    tail = os.urandom(CHUNK + 10)
    payload = tmp_path / "payload"
    sparse(payload, size, tail)
    manifest = describe([("a", (size // 2,), TENSOR_ROLE_OTHER)], ELEMENT_TYPE_BFLOAT16)
    manifest.digest = bytes(32)
    validate(manifest)
    assert manifest.payload_bytes == size
    start = size - len(tail)
    frames = list(read_chunks(payload, start))
    spools = Spools(tmp_path / "spools")
    spool = spools.open("run", 1, "site", manifest)
    os.truncate(spool.path, start)  # as if all but the last chunks had come
    spool.close()
    spool = spools.open("run", 1, "site", manifest)
    assert spool.offset == start
    for frame in frames:
        piece = parse_upload(frame)
        assert piece == parse_download(frame)
        assert isinstance(piece, Piece)
        spool.write(piece.offset, piece.data)
    with pytest.raises(FsllmError, match="does not follow"):
        spool.write(size, memoryview(b"more"))
    assert spool.offset == size
    spool.close()
    with spool.path.open("rb") as file:
        file.seek(start)
        assert file.read() == tail


@pytest.mark.slow
@pytest.mark.skipif("FSLLM_TEST_HUGE" not in os.environ, reason="takes minutes and 20 GB of disk: FSLLM_TEST_HUGE=1")
@pytest.mark.timeout(3600)
def test_three_gibibytes_in_one_tensor(server: ServerProcess, tmp_path: Path) -> None:
    """Ones and zeros in bfloat16, sent chunk by chunk, reduced, and compared chunk by chunk."""
    size = 3 * GIB
    ones = np.full(CHUNK // 2, 0x3F80, np.uint16).tobytes()
    peer = Peer(server, server.enroll("huge"))
    plan = {
        "name": "huge",
        "rounds": 1,
        "model": {"name": "synthetic"},
        "algorithm": {"name": "noop"},
        "cohort": {"quorum": 1, "sites": ["huge"]},
        "timing": {"gather_seconds": 0.01, "idle_seconds": 3600},
        "wire": {"element_type": "bf16"},
        "evaluate": {"every": 0},
    }
    run = submit(server, plan)
    peer.attach(seconds=1800)
    peer.answer(peer.order(), done=pb.Done())
    zero, delta = tmp_path / "zero", tmp_path / "delta"
    sparse(zero, size, ones)
    sparse(delta, size, ones)
    with beating(peer):
        for path in (zero, delta):
            order = peer.order()
            manifest = describe([("a", (size // 2,), TENSOR_ROLE_OTHER)], ELEMENT_TYPE_BFLOAT16)
            digest = PayloadDigest(manifest)
            digest.update_file(path)
            manifest.digest = digest.digest()
            begin = Tensors(manifest, b"").begin(order)
            upload = peer.channel.stream_stream(
                "/fsllm.v1.FederationService/Upload",
                request_serializer=None,
                response_deserializer=pb.UploadResponse.FromString,
            )

            def frames(begin: pb.UploadBegin = begin, path: Path = path) -> Iterator[bytes]:
                yield pb.UploadRequest(begin=begin).SerializeToString()
                yield from read_chunks(path)

            kinds = [response.WhichOneof("kind") for response in upload(frames(), timeout=1800)]
            assert kinds[-2:] == ["ready", "receipt"]
        done = await_run(server, run)
    assert done.commits[-1].version.payload_bytes == size
    export = server.channel(server.operator()).unary_stream(
        "/fsllm.v1.ControlService/ExportRun",
        request_serializer=control.ExportRunRequest.SerializeToString,
        response_deserializer=None,
    )
    end = size - CHUNK
    _, last = read_payload(export(control.ExportRunRequest(run_id=run, offset=end), timeout=CALL_SECONDS), end)
    assert set(np.frombuffer(last, np.uint16).tolist()) == {0x4000}  # 1 + 1
    middle = export(control.ExportRunRequest(run_id=run, offset=2 * GIB), timeout=CALL_SECONDS)
    next(middle)
    piece = parse_download(next(middle))
    assert isinstance(piece, Piece)
    assert (piece.offset, bytes(piece.data)) == (2 * GIB, bytes(CHUNK))
    middle.cancel()


@contextmanager
def beating(peer: Peer) -> Iterator[None]:
    """Let a peer say now and then that it lives, as a daemon does."""
    stream, done = peer.stream, threading.Event()
    assert stream is not None

    def beat() -> None:
        while not done.wait(10):
            stream.put(pb.AttachRequest(heartbeat=pb.Heartbeat()))

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def await_run(server: ServerProcess, run: str) -> control.Run:
    """Wait for the end of a run, as long as it takes."""
    stub = server.control()
    for _ in stub.WatchRun(control.WatchRunRequest(run_id=run), timeout=1800):
        pass
    found: control.Run = stub.GetRun(control.GetRunRequest(run_id=run), timeout=CALL_SECONDS).run
    assert found.status == control.RUN_STATUS_DONE, found.message
    return found
