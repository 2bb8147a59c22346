"""Updates that lie, on a real server: refused with the reason, before anything is allocated, written or counted."""

import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import psutil
import pytest
from tests.system.harness import CALL_SECONDS, ServerProcess, meaning_of, reason_of
from tests.system.peer import Peer, Tensors, join_all
from tests.system.runs import noop_plan, submit

from fsllm.v1 import control_pb2 as control
from fsllm.v1 import federation_pb2 as pb
from fsllm.v1.tensors_pb2 import (
    ELEMENT_TYPE_BFLOAT16,
    ELEMENT_TYPE_FLOAT16,
    ELEMENT_TYPE_FLOAT32,
    TENSOR_ROLE_OTHER,
    ElementType,
    Manifest,
    ManifestPart,
    TensorSpec,
)
from fsllm_common.tensors.chunks import frame_chunk
from fsllm_common.tensors.manifest import MAX_TENSORS, PayloadDigest, describe
from fsllm_common.tensors.parts import MAX_MANIFEST

pytestmark = pytest.mark.slow

MIB = 1 << 20
QUOTA = 64 * MIB


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with ServerProcess(
        tmp_path_factory.mktemp("fsllm") / "server",
        *("--upload-stall-seconds", "5", "--member-disk-bytes", str(QUOTA), "--calls-per-minute", "100000"),
    ) as server:
        yield server


@pytest.fixture(scope="module")
def zero(tmp_path_factory: pytest.TempPathFactory) -> Tensors:
    return Tensors.make(tmp_path_factory.mktemp("zero"), 0.5, elements=3000)


def start(server: ServerProcess, *sites: str, **keys: Any) -> str:  # noqa: ANN401 - plan sections
    return submit(server, noop_plan(*sites, **keys))


def site(server: ServerProcess) -> Peer:
    return Peer(server, server.enroll(f"site-{uuid4().hex[:8]}"))


def training(server: ServerProcess, zero: Tensors, **keys: Any) -> tuple[Peer, pb.Order]:  # noqa: ANN401
    """Return a site alone in a run, and its TRAIN order."""
    peer = site(server)
    start(server, peer.name, **keys)
    return peer, peer.join(zero)


def building(server: ServerProcess) -> tuple[Peer, pb.Order]:
    """Return a site alone in a run, and its BUILD order."""
    peer = site(server)
    start(server, peer.name)
    peer.attach()
    peer.answer(peer.order(), done=pb.Done())
    return peer, peer.order()


def refused(peer: Peer, begin: pb.UploadBegin, *then: bytes) -> str:
    """Announce an upload and return why it fails."""
    upload = peer.upload()
    upload.begin(begin)
    for wire in then:
        upload.put(wire)
    upload.close()
    return reason_of(upload.error())


def of_values(values: np.ndarray[Any, Any], element_type: ElementType.ValueType, base: Manifest) -> Tensors:
    """Return honest tensors of these raw values, in the base's shapes."""
    manifest = describe(((t.name, tuple(t.shape), t.role) for t in base.tensors), element_type)
    digest = PayloadDigest(manifest)
    digest.update(values.tobytes())
    manifest.digest = digest.digest()
    return Tensors(manifest, values.tobytes())


def files(server: ServerProcess) -> list[Path]:
    return [path for path in (server.state / "spools").rglob("*") if path.is_file()]


# Values.


@pytest.mark.parametrize(
    ("wire", "element_type", "bits"),
    [
        ("fp32", ELEMENT_TYPE_FLOAT32, struct.pack("<f", float("nan"))),
        ("fp32", ELEMENT_TYPE_FLOAT32, struct.pack("<f", float("-inf"))),
        ("fp32", ELEMENT_TYPE_FLOAT32, b"\x01\x00\x80\x7f"),  # a signalling NaN
        ("fp16", ELEMENT_TYPE_FLOAT16, struct.pack("<e", float("inf"))),
        ("bf16", ELEMENT_TYPE_BFLOAT16, b"\xc0\x7f"),
        ("bf16", ELEMENT_TYPE_BFLOAT16, b"\x80\xff"),
    ],
)
def test_values_that_are_no_numbers(
    server: ServerProcess, zero: Tensors, wire: str, element_type: ElementType.ValueType, bits: bytes
) -> None:
    peer, order = training(server, zero, wire={"element_type": wire})
    width = len(bits)
    raw = np.zeros(3000 * width, np.uint8)
    raw[-width:] = np.frombuffer(bits, np.uint8)  # the very last element
    bad = of_values(raw, element_type, zero.manifest)
    upload = peer.upload()
    upload.begin(bad.begin(order))
    upload.send(bad.payload, upload.ready())
    upload.close()
    error = meaning_of(upload.error())
    assert (error.reason, "'b.lora_B.weight'" in error.message) == ("NOT_FINITE", True)
    good = of_values(np.zeros(3000 * width, np.uint8), element_type, zero.manifest)
    assert not peer.deliver(order, good).duplicate


def test_a_norm_beyond_the_plans_bound(server: ServerProcess, zero: Tensors) -> None:
    bound = {"element_type": "fp32", "max_update_norm": 1.0}
    peer, order = training(server, zero, wire=bound)
    values = np.zeros(3000, np.float32)
    values[7] = 1.001
    large = of_values(values, ELEMENT_TYPE_FLOAT32, zero.manifest)
    upload = peer.upload()
    upload.begin(large.begin(order))
    upload.send(large.payload, upload.ready())
    upload.close()
    assert reason_of(upload.error()) == "NORM_TOO_LARGE"
    values[7] = 0.999
    assert peer.deliver(order, of_values(values, ELEMENT_TYPE_FLOAT32, zero.manifest)).payload_bytes == 12_000


# Manifests.


def _tensor(at: int, **changes: Any) -> Callable[[Manifest], None]:  # noqa: ANN401 - fields
    def change(manifest: Manifest) -> None:
        for name, value in changes.items():
            if name == "shape":
                manifest.tensors[at].shape[:] = value
            else:
                setattr(manifest.tensors[at], name, value)

    return change


def _swap(manifest: Manifest) -> None:
    manifest.tensors.reverse()


def _drop(manifest: Manifest) -> None:
    del manifest.tensors[1]
    manifest.payload_bytes = 6000


def _extra(manifest: Manifest) -> None:
    manifest.tensors.add(name="c", element_type=ELEMENT_TYPE_FLOAT32, shape=[0], role=TENSOR_ROLE_OTHER)


def _field(name: str, value: Any) -> Callable[[Manifest], None]:  # noqa: ANN401
    return lambda manifest: setattr(manifest, name, value)


LIES: dict[str, Callable[[Manifest], None]] = {
    "another name": _tensor(0, name="a.lora_A.weighs"),
    "no name": _tensor(0, name=""),
    "a name with a newline": _tensor(0, name="a\n"),
    "a name with a tab, which the digest's text separates by": _tensor(0, name="a\tf32"),
    "a name that is not ASCII": _tensor(0, name="ä"),
    "a name of 513 characters": _tensor(0, name="a" * 513),
    "a name twice": _tensor(1, name="a.lora_A.weight"),
    "another order": _swap,
    "one tensor less": _drop,
    "one tensor more, of no elements": _extra,
    "the same elements in another shape": _tensor(0, shape=[1, 1500]),
    "nine dimensions": _tensor(0, shape=[1500, 1, 1, 1, 1, 1, 1, 1, 1]),
    "a dimension of zero": _tensor(0, shape=[0]),
    "shapes whose product is right modulo 2^64": _tensor(0, shape=[1500, (1 << 63) + 1, (1 << 63) + 1]),
    "shapes whose product is huge": _tensor(0, shape=[(1 << 64) - 1] * 8),
    "another role": _tensor(0, role=TENSOR_ROLE_OTHER),
    "a role of a later version": _tensor(0, role=99),  # type: ignore[arg-type]
    "another element type": _tensor(0, element_type=ELEMENT_TYPE_FLOAT16),
    "no element type": _tensor(0, element_type=0),
    "an element type of a later version": _tensor(0, element_type=77),
    "no payload": _field("payload_bytes", 0),
    "a payload of 2^64 - 1 bytes": _field("payload_bytes", (1 << 64) - 1),
    "a gigabyte": _field("payload_bytes", 1 << 30),
    "no digest": _field("digest", b""),
    "a digest of SHA-512's length": _field("digest", bytes(64)),
    "the configuration of an adapter": _field("adapter_config", "{}"),
    "fewer tensors in all than there are": _field("tensor_count", 1),
    "four billion tensors": _field("tensor_count", (1 << 32) - 1),
    "tensors that do not come": _field("tensor_count", 3),
}


def test_manifests_that_lie(server: ServerProcess, zero: Tensors) -> None:
    peer, order = training(server, zero)
    before = files(server)
    for lie, change in LIES.items():
        manifest = Manifest()
        manifest.CopyFrom(zero.manifest)
        change(manifest)
        assert refused(peer, zero.begin(order, manifest=manifest)) == "MANIFEST_INVALID", lie
    for count in ("examples", "tokens", "steps"):
        assert refused(peer, zero.begin(order, **{count: (1 << 64) - 1})) == "MANIFEST_INVALID"
    for metric in (pb.Metric(name="a\nb"), pb.Metric(name="a", weight=1e300), pb.Metric(name="a", weight=-1)):
        assert refused(peer, zero.begin(order, metrics=[metric])) == "MESSAGE_INVALID"
    assert refused(peer, zero.begin(order, metrics=[pb.Metric(name=f"m{at}") for at in range(65)])) == "MESSAGE_INVALID"
    assert files(server) == before
    assert not peer.deliver(order, zero).duplicate


def test_version_zero_of_a_size_that_is_a_lie(server: ServerProcess) -> None:
    peer, order = building(server)
    process = psutil.Process(server.process.pid)
    before, resident = files(server), process.memory_info().rss
    for elements, reason in (
        (1 << 62, "MANIFEST_INVALID"),  # past every limit
        (1 << 33, "MANIFEST_INVALID"),  # 32 GiB, twice what an adapter may have
        (QUOTA // 4 + 1, "QUOTA_EXCEEDED"),  # a byte more than this site may hold on the server's disk
    ):
        manifest = (
            describe([("a", (elements,), TENSOR_ROLE_OTHER)], ELEMENT_TYPE_FLOAT32)
            if elements < 1 << 60
            else (
                Manifest(
                    tensors=[TensorSpec(name="a", element_type=1, shape=[elements], role=7)], payload_bytes=1 << 63
                )
            )
        )
        manifest.digest = bytes(32)
        begin = pb.UploadBegin(order_id=order.order_id, run_id=order.run_id, manifest=manifest)
        assert refused(peer, begin) == reason
    assert files(server) == before
    assert process.memory_info().rss - resident < 16 * MIB
    # What fits is not allocated before it comes.
    manifest = describe([("a", (QUOTA // 8,), TENSOR_ROLE_OTHER)], ELEMENT_TYPE_FLOAT32)
    manifest.digest = bytes(32)
    upload = peer.upload()
    upload.begin(pb.UploadBegin(order_id=order.order_id, run_id=order.run_id, manifest=manifest))
    assert upload.ready() == 0
    (new,) = set(files(server)) - set(before)
    assert new.stat().st_blocks == 0
    upload.call.cancel()


def test_manifests_made_to_fill_memory(server: ServerProcess) -> None:
    """100,000 tensors of huge names, parts without end, and messages nested ten thousand deep."""
    peer, order = building(server)
    process = psutil.Process(server.process.pid)
    resident = process.memory_info().rss

    def begin(tensor_count: int) -> pb.UploadBegin:
        manifest = Manifest(digest=bytes(32), tensor_count=tensor_count)
        return pb.UploadBegin(order_id=order.order_id, run_id=order.run_id, manifest=manifest)

    def part(first: int, count: int, name: str) -> bytes:
        specs = [TensorSpec(name=f"{name}{at:07d}", element_type=1) for at in range(first, first + count)]
        return pb.UploadRequest(part=ManifestPart(tensors=specs)).SerializeToString()

    large = part(0, 6000, "n" * 500)  # 3 MB
    assert refused(peer, begin(100_000), *[large] * (MAX_MANIFEST // len(large) + 2)) == "MANIFEST_INVALID"
    assert refused(peer, begin(MAX_TENSORS + 1)) == "MANIFEST_INVALID"
    assert refused(peer, begin(10), part(0, 11, "a")) == "MANIFEST_INVALID"
    assert refused(peer, begin(10), part(0, 0, "a")) == "MANIFEST_INVALID"
    assert refused(peer, begin(10), part(0, 5, "a")) == "MANIFEST_INVALID"  # and no more
    assert refused(peer, begin(10), frame_chunk(0, b"data")) == "MANIFEST_INVALID"
    assert refused(peer, begin(10), begin(10).SerializeToString()) in {"MANIFEST_INVALID", "CHUNK_CORRUPT"}
    # Groups within groups, of a field that nobody knows.
    assert refused(peer, begin(0), b"\xa3\x06" * 10_000) in {"CHUNK_CORRUPT", "MANIFEST_INVALID"}
    nested = Manifest(digest=bytes(32), adapter_config="[" * 100_000)
    deep = pb.UploadBegin(order_id=order.order_id, run_id=order.run_id, manifest=nested)
    assert refused(peer, deep) == "MANIFEST_INVALID"
    # A message beyond gRPC's own limit of 4 MiB does not get in at all.
    upload = peer.upload()
    upload.put(bytes(5 * MIB))
    assert reason_of(upload.error()) == "MESSAGE_INVALID"
    assert process.memory_info().rss - resident < 160 * MIB
    honest = Tensors.make(server.state.parent, 0.25, elements=10)
    assert not peer.deliver(order, honest).duplicate


# Whose, and from where.


def test_what_belongs_to_others(server: ServerProcess, zero: Tensors, tmp_path: Path) -> None:
    peers = sorted((site(server) for _ in range(2)), key=lambda peer: peer.name)
    run = start(server, *(peer.name for peer in peers))
    first, second = peers
    order, others = join_all(peers, zero)
    delta = Tensors.make(tmp_path, 1.0, elements=3000)
    second.deliver(others, delta)
    stranger, elsewhere = training(server, zero)
    # Another's order, and one's own order under another's name or in another's run.
    assert refused(first, delta.begin(others)) == "NOT_WANTED"
    assert refused(stranger, delta.begin(order)) == "NOT_WANTED"
    assert refused(stranger, delta.begin(elsewhere, run_id=run)) == "NOT_WANTED"
    # The digest of what another has delivered gets no receipt, and wrong bytes under it are found out.
    status = first.stub.UploadStatus(
        pb.UploadStatusRequest(run_id=run, round=1, digest=delta.manifest.digest), timeout=CALL_SECONDS
    )
    assert (status.committed_offset, status.HasField("receipt")) == (0, False)
    upload = first.upload()
    upload.begin(delta.begin(order))
    upload.send(bytes(len(delta.payload)), upload.ready())
    upload.close()
    assert reason_of(upload.error()) == "DIGEST_MISMATCH"
    # Versions that were, will be, or are another run's base.
    for digest in (b"", bytes(32), delta.manifest.digest, order.base.digest + b"\0", order.base.digest[:31]):
        assert refused(first, delta.begin(order, base_digest=digest)) == "BASE_STALE"
    # begin twice ends the stream, is told to those who watch, and leaves the order open.
    upload = first.upload()
    upload.begin(delta.begin(order))
    upload.ready()
    upload.begin(delta.begin(order))
    assert reason_of(upload.error()) == "MANIFEST_INVALID"
    assert not first.deliver(order, delta).duplicate
    events = list(server.control().WatchRun(control.WatchRunRequest(run_id=run), timeout=CALL_SECONDS))
    assert [event.subject for event in events if event.kind == "rejected"] == [first.name] * 2
    assert events[-1].subject == "done"
    assert "failed by a bug" not in server.log
