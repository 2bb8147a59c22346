"""Uploads and downloads over the wire: what is recorded, what is refused, and that a broken one goes on."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import grpc
import numpy as np
import pytest
from tests.system import runs
from tests.system.harness import CALL_SECONDS, ServerProcess, meaning_of, reason_of
from tests.system.peer import Peer, Tensors, join_all, read_payload

from fsllm.v1 import control_pb2 as control
from fsllm.v1 import federation_pb2 as pb
from fsllm.v1.tensors_pb2 import Manifest
from fsllm_common.tensors.chunks import CHUNK, frame_chunk

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with ServerProcess(
        tmp_path_factory.mktemp("fsllm") / "server", "--uploads-at-once", "2", "--upload-stall-seconds", "3"
    ) as server:
        yield server


@pytest.fixture(scope="module")
def zero(tmp_path_factory: pytest.TempPathFactory) -> Tensors:
    return Tensors.make(tmp_path_factory.mktemp("zero"), 0.5, config='{"peft_type": "LORA"}')


def submit(server: ServerProcess, *sites: str, **keys: object) -> str:
    """Start a run of these sites that trains nothing."""
    return runs.submit(server, runs.noop_plan(*sites, **keys))


def site(server: ServerProcess) -> Peer:
    return Peer(server, server.enroll(f"site-{uuid4().hex[:8]}"))


def sites(server: ServerProcess, count: int) -> list[Peer]:
    return sorted((site(server) for _ in range(count)), key=lambda peer: peer.name)


def until_ended(server: ServerProcess, run: str) -> list[control.WatchRunResponse]:
    return list(server.control().WatchRun(control.WatchRunRequest(run_id=run), timeout=CALL_SECONDS))


@pytest.fixture
def training(server: ServerProcess, zero: Tensors) -> tuple[Peer, pb.Order]:
    """A site alone in a run of one round, with its TRAIN order."""
    peer = site(server)
    submit(server, peer.name)
    return peer, peer.join(zero)


def test_a_round_from_submission_to_export(server: ServerProcess, zero: Tensors, tmp_path: Path) -> None:
    peers = sites(server, 2)
    run = submit(server, *(peer.name for peer in peers))
    orders = join_all(peers, zero)
    deltas = [Tensors.make(tmp_path, 1.0), Tensors.make(tmp_path, 2.0)]
    for peer, order, delta in zip(peers, orders, deltas, strict=True):
        manifest, payload = peer.download(order.base, run)
        assert payload == zero.payload
        assert manifest == zero.manifest
        receipt = peer.deliver(order, delta)
        assert (receipt.digest, receipt.payload_bytes, receipt.duplicate) == (
            delta.manifest.digest,
            len(delta.payload),
            False,
        )
    events = until_ended(server, run)
    assert [event.kind for event in events].count("commit") == 2
    assert [event.sequence for event in events if event.sequence] == sorted(
        event.sequence for event in events if event.sequence
    )
    export: Any = server.channel(server.operator()).unary_stream(
        "/fsllm.v1.ControlService/ExportRun",
        request_serializer=control.ExportRunRequest.SerializeToString,
        response_deserializer=None,
    )
    manifest, payload = read_payload(export(control.ExportRunRequest(run_id=run), timeout=CALL_SECONDS))
    assert manifest.adapter_config == '{"peft_type": "LORA"}'
    # Equal weights: the mean of 1 and 2, on top of version 0.
    expected = sum(
        np.frombuffer(part, "<f4") * weight
        for part, weight in ((zero.payload, 1), (deltas[0].payload, 0.5), (deltas[1].payload, 0.5))
    )
    np.testing.assert_allclose(np.frombuffer(payload, "<f4"), expected, rtol=1e-6)
    older = read_payload(export(control.ExportRunRequest(run_id=run, version=0), timeout=CALL_SECONDS))
    assert older == (zero.manifest, zero.payload)
    with pytest.raises(grpc.RpcError) as refused:
        next(export(control.ExportRunRequest(run_id=run, version=9), timeout=CALL_SECONDS))
    assert reason_of(refused.value) == "VERSION_UNKNOWN"


def test_the_generated_code_understands_the_raw_frames(training: tuple[Peer, pb.Order], zero: Tensors) -> None:
    peer, order = training
    responses = list(
        peer.stub.Download(
            pb.DownloadRequest(run_id=order.run_id, digest=order.base.digest, offset=CHUNK), timeout=CALL_SECONDS
        )
    )
    assert responses[0].manifest == zero.manifest
    assert [response.chunk.offset for response in responses[1:]] == [CHUNK, 2 * CHUNK]
    assert b"".join(response.chunk.data for response in responses[1:]) == zero.payload[CHUNK:]


@pytest.mark.parametrize(("offset", "reason"), [(10**9, "OFFSET_OUT_OF_RANGE"), (None, "BLOB_UNKNOWN")])
def test_downloads_that_are_refused(training: tuple[Peer, pb.Order], offset: int | None, reason: str) -> None:
    peer, order = training
    version = order.base if offset is not None else pb.Version(digest=bytes(32))
    with pytest.raises(grpc.RpcError) as refused:
        peer.download(version, order.run_id, offset or 0)
    assert reason_of(refused.value) == reason


def test_a_member_can_not_fetch_another_runs_version(server: ServerProcess, training: tuple[Peer, pb.Order]) -> None:
    _, order = training
    with pytest.raises(grpc.RpcError) as refused:
        site(server).download(order.base, order.run_id)
    assert reason_of(refused.value) == "BLOB_UNKNOWN"


def test_a_broken_upload_goes_on_where_it_stood(training: tuple[Peer, pb.Order], tmp_path: Path) -> None:
    peer, order = training
    delta = Tensors.make(tmp_path, 3.0)
    asked = pb.UploadStatusRequest(run_id=order.run_id, round=order.round, digest=delta.manifest.digest)
    first = peer.upload()
    first.begin(delta.begin(order))
    assert first.ready() == 0
    first.send(delta.payload, until=2 * CHUNK)
    # A site that comes again while its first stream still hangs takes over; what had arrived by then counts.
    second = peer.upload()
    second.begin(delta.begin(order))
    offset = second.ready()
    assert reason_of(first.error()) == "NOT_WANTED"
    assert offset % CHUNK == 0
    second.send(delta.payload, offset, until=2 * CHUNK)
    second.close()
    assert reason_of(second.error()) == "OFFSET_OUT_OF_RANGE"
    status = peer.stub.UploadStatus(asked, timeout=CALL_SECONDS)
    assert (status.committed_offset, status.HasField("receipt")) == (2 * CHUNK, False)
    third = peer.upload()
    third.begin(delta.begin(order))
    assert third.ready() == 2 * CHUNK
    third.send(delta.payload, 2 * CHUNK)
    assert not third.receipt().duplicate
    status = peer.stub.UploadStatus(asked, timeout=CALL_SECONDS)
    assert status.receipt.digest == delta.manifest.digest


def test_a_site_delivers_in_two_runs_at_once(server: ServerProcess, zero: Tensors, tmp_path: Path) -> None:
    peer, delta = site(server), Tensors.make(tmp_path, 3.0)
    streams = []
    for _ in range(2):
        submit(server, peer.name)
        (order,) = join_all([peer], zero)
        stream = peer.upload()
        stream.begin(delta.begin(order))
        assert stream.ready() == 0
        stream.send(delta.payload, until=CHUNK)
        streams.append(stream)
    for stream in streams:
        stream.send(delta.payload, CHUNK)
        assert not stream.receipt().duplicate


def test_the_same_payload_again_and_another_one(server: ServerProcess, zero: Tensors, tmp_path: Path) -> None:
    first, second = sites(server, 2)  # the second never delivers, so the round stays open
    run = submit(server, first.name, second.name)
    order, _ = join_all([first, second], zero)
    delta = Tensors.make(tmp_path, 1.0)
    first.deliver(order, delta)
    again = first.upload()
    again.begin(delta.begin(order))
    assert again.receipt().duplicate
    other = first.upload()
    other.begin(Tensors.make(tmp_path, 2.0).begin(order))
    assert reason_of(other.error()) == "UPDATE_CONFLICT"
    # An order is its member's own.
    foreign = second.upload()
    foreign.begin(delta.begin(order))
    assert reason_of(foreign.error()) in {"NOT_WANTED", "ORDER_UNKNOWN"}
    server.control().CancelRun(control.CancelRunRequest(run_id=run), timeout=CALL_SECONDS)


def flipped(payload: bytes, at: int) -> bytes:
    return payload[:at] + bytes((payload[at] ^ 1,)) + payload[at + 1 :]


def test_what_is_damaged_or_untrue_is_refused_and_the_right_one_accepted(
    training: tuple[Peer, pb.Order], tmp_path: Path
) -> None:
    peer, order = training
    delta = Tensors.make(tmp_path, 4.0)

    # A chunk that changed on its way: told at once, and what came before stays.
    upload = peer.upload()
    upload.begin(delta.begin(order))
    upload.ready()
    upload.send(delta.payload, until=CHUNK)
    frame = frame_chunk(CHUNK, delta.payload[CHUNK : 2 * CHUNK])
    upload.put(flipped(frame, len(frame) - 1))
    error = upload.error()
    assert reason_of(error) == "CHUNK_CORRUPT"

    # Chunks that leave a hole, or are not of 1 MiB.
    for offset, data, reason in (
        (2 * CHUNK, delta.payload[2 * CHUNK :], "OFFSET_OUT_OF_RANGE"),
        (CHUNK, delta.payload[CHUNK : CHUNK + 10], "MANIFEST_INVALID"),
    ):
        upload = peer.upload()
        upload.begin(delta.begin(order))
        assert upload.ready() == CHUNK
        upload.put(frame_chunk(offset, data))
        assert reason_of(upload.error()) == reason

    # More bytes than announced.
    upload = peer.upload()
    upload.begin(delta.begin(order))
    upload.send(delta.payload, upload.ready())
    upload.put(frame_chunk(len(delta.payload), b"more"))
    assert reason_of(upload.error()) in {"MANIFEST_INVALID", "OFFSET_OUT_OF_RANGE"}

    # Bytes that are not those of the digest: the whole is thrown away.
    upload = peer.upload()
    lying = Tensors.make(tmp_path, 5.0)
    upload.begin(lying.begin(order))
    upload.send(flipped(lying.payload, 5), upload.ready())
    upload.close()
    assert reason_of(upload.error()) == "DIGEST_MISMATCH"

    infinite = Tensors.make(tmp_path, float("1e38"))
    assert peer.deliver(order, infinite).digest == infinite.manifest.digest


def test_manifests_that_do_not_fit_the_base_are_refused_before_any_byte(
    training: tuple[Peer, pb.Order], tmp_path: Path
) -> None:
    peer, order = training
    delta = Tensors.make(tmp_path, 1.0)
    renamed = Manifest()
    renamed.CopyFrom(delta.manifest)
    renamed.tensors[0].name = "a.lora_A.other"
    oversize = Manifest()
    oversize.CopyFrom(delta.manifest)
    oversize.tensors[0].shape[0] *= 1000
    dishonest = Manifest()
    dishonest.CopyFrom(delta.manifest)
    dishonest.payload_bytes += 4
    for changes, reason in (
        ({"manifest": renamed}, "MANIFEST_INVALID"),
        ({"manifest": oversize}, "MANIFEST_INVALID"),
        ({"manifest": dishonest}, "MANIFEST_INVALID"),
        ({"manifest": Manifest()}, "MANIFEST_INVALID"),
        ({"base_digest": bytes(32)}, "BASE_STALE"),
        ({"run_id": "nobody"}, "NOT_WANTED"),
        ({"round": 7}, "NOT_WANTED"),
    ):
        upload = peer.upload()
        upload.begin(delta.begin(order, **changes))
        assert reason_of(upload.error()) == reason, changes
    empty = peer.upload()
    empty.close()
    assert reason_of(empty.error()) == "MANIFEST_INVALID"
    assert not peer.deliver(order, delta).duplicate


def test_a_stalled_upload_frees_its_slot_and_the_queue_is_told(
    server: ServerProcess, zero: Tensors, tmp_path: Path
) -> None:
    peers = sites(server, 4)
    run = submit(server, *(peer.name for peer in peers))
    orders = join_all(peers, zero)
    delta = Tensors.make(tmp_path, 1.0)
    uploads = [peer.upload() for peer in peers]
    for upload, order in zip(uploads[:2], orders[:2], strict=True):  # two hold the two slots and send nothing
        upload.begin(delta.begin(order))
        assert upload.ready() == 0
    places = []
    for upload, order in zip(uploads[2:], orders[2:], strict=True):
        upload.begin(delta.begin(order))
        places.append(upload.get().queued.place)
    assert places == [1, 2]
    stalled = meaning_of(uploads[0].error())
    assert (stalled.reason, stalled.retry_after) == ("SITE_IDLE", 1.0)
    for upload in uploads[2:]:
        upload.send(delta.payload, upload.ready())
        assert upload.receipt().digest == delta.manifest.digest
    for peer, order in zip(peers[:2], orders[:2], strict=True):
        assert not peer.deliver(order, delta).duplicate
    until_ended(server, run)


def test_an_acknowledged_upload_and_half_of_another_survive_a_kill(tmp_path: Path, zero: Tensors) -> None:
    with ServerProcess(tmp_path / "server") as server:
        credentials = {name: server.enroll(name) for name in ("a", "b")}
        run = submit(server, "a", "b")
        peers = {name: Peer(server, credential) for name, credential in credentials.items()}
        orders = dict(zip(peers, join_all(list(peers.values()), zero), strict=True))
        delta = Tensors.make(tmp_path, 1.0)
        peers["a"].deliver(orders["a"], delta)
        half = peers["b"].upload()
        half.begin(delta.begin(orders["b"]))
        half.ready()
        half.send(delta.payload, until=CHUNK)
        half.close()
        assert reason_of(half.error()) == "OFFSET_OUT_OF_RANGE"  # so the chunk has been written
        server.kill()
        server.restart()
        peers = {name: Peer(server, credential) for name, credential in credentials.items()}
        for name, peer in peers.items():
            peer.attach(orders[name].order_id)
        again = peers["a"].upload()
        again.begin(delta.begin(orders["a"]))
        assert again.receipt().duplicate
        rest = peers["b"].upload()
        rest.begin(delta.begin(orders["b"]))
        assert rest.ready() == CHUNK
        rest.send(delta.payload, CHUNK)
        rest.receipt()
        assert until_ended(server, run)[-1].kind == "status"
        shown = server.control().GetRun(control.GetRunRequest(run_id=run), timeout=CALL_SECONDS).run
        assert shown.status == control.RUN_STATUS_DONE
        assert [c.member for c in shown.commits[1].contributions] == ["a", "b"]
