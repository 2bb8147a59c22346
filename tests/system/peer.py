"""A site or evaluator at the level of the wire, for tests that must do single steps, or do them wrong.

peer = Peer(server, server.enroll("a"))
train = peer.join(plan_id)          # answers JOIN, delivers version 0 when asked to build it, checks it, gets TRAIN
upload = peer.upload(begin_of(train, manifest))
upload.ready(); upload.send(payload); upload.receipt()
"""

import queue
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from tests.system.harness import ServerProcess

from fsllm.v1 import federation_pb2 as pb
from fsllm.v1.federation_pb2_grpc import FederationServiceStub
from fsllm.v1.tensors_pb2 import ELEMENT_TYPE_FLOAT32, Manifest
from fsllm_common import PROTOCOL_VERSION
from fsllm_common.identity.keys import Credential
from fsllm_common.tensors.arrays import encode
from fsllm_common.tensors.chunks import CHUNK, Piece, frame_chunk, parse_download
from fsllm_common.tensors.parts import ManifestReader, split_manifest

DEADLINE = 60.0
SERVICE = "/fsllm.v1.FederationService"


class Stream:
    """A bidirectional call whose requests are put in one by one."""

    def __init__(self, method: Any, seconds: float = DEADLINE) -> None:  # noqa: ANN401 - a multi-callable
        self._requests: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.call = method(iter(self._requests.get, None), timeout=seconds)

    def put(self, request: Any) -> None:  # noqa: ANN401 - bytes or a message
        """Send a request."""
        self._requests.put(request)

    def close(self) -> None:
        """Say that no more requests come."""
        self._requests.put(None)

    def get(self) -> Any:  # noqa: ANN401 - a response
        """Wait for the next response; raises grpc.RpcError when the call has failed."""
        return next(self.call)

    def error(self) -> grpc.RpcError:
        """Wait for the call to fail and return how."""
        try:
            for _ in self.call:
                pass
        except grpc.RpcError as error:
            return error
        raise AssertionError("the call has ended well")


class Upload(Stream):
    """An Upload call in raw frames."""

    def begin(self, begin: pb.UploadBegin) -> None:
        """Announce the payload, in several messages when its manifest is large."""
        first, parts = split_manifest(begin.manifest)
        if parts:
            whole, begin = begin, pb.UploadBegin()
            begin.CopyFrom(whole)
            begin.manifest.CopyFrom(first)
        self.put(pb.UploadRequest(begin=begin).SerializeToString())
        for part in parts:
            self.put(pb.UploadRequest(part=part).SerializeToString())

    def ready(self) -> int:
        """Wait for the slot, past any Queued, and return the offset to send from."""
        while (response := self.get()).WhichOneof("kind") == "queued":
            pass
        assert response.WhichOneof("kind") == "ready", response
        return int(response.ready.offset)

    def send(self, payload: bytes, offset: int = 0, until: int | None = None) -> None:
        """Send the payload's chunks from ``offset`` to ``until`` (its end)."""
        for at in range(offset, len(payload) if until is None else until, CHUNK):
            self.put(frame_chunk(at, payload[at : at + CHUNK]))

    def receipt(self) -> pb.Receipt:
        """Close and wait for the receipt."""
        self.close()
        response = self.get()
        assert response.WhichOneof("kind") == "receipt", response
        receipt: pb.Receipt = response.receipt
        return receipt


class Peer:
    """One member: its channel and its Attach stream."""

    def __init__(self, server: ServerProcess, credential: Credential) -> None:
        self.name = credential.member.name
        self.channel = server.channel(credential)
        self.stub = FederationServiceStub(self.channel)
        self.stream: Stream | None = None

    def attach(self, *held: str, version: int = PROTOCOL_VERSION, seconds: float = DEADLINE) -> Stream:
        """Open the Attach stream, send Hello, and wait for Welcome."""
        self.stream = Stream(self.stub.Attach, seconds)
        hello = pb.Hello(protocol_version=version, software_version="test", held_orders=held)
        self.stream.put(pb.AttachRequest(hello=hello))
        welcome = self.stream.get().welcome
        assert welcome.member == self.name
        return self.stream

    def order(self) -> pb.Order:
        """Wait for the next order, past withdrawals."""
        assert self.stream is not None
        while (response := self.stream.get()).WhichOneof("kind") != "order":
            pass
        order: pb.Order = response.order
        return order

    def answer(self, order: pb.Order, **outcome: Any) -> None:  # noqa: ANN401 - a message
        """Answer an order, e.g. ``done=pb.Done()``."""
        assert self.stream is not None
        self.stream.put(pb.AttachRequest(answer=pb.Answer(order_id=order.order_id, **outcome)))

    def join(self, zero: "Tensors") -> pb.Order:
        """Do what comes before training (as the builder or not), and return the first TRAIN order."""
        if self.stream is None:
            self.attach()
        while (order := self.order()).kind != pb.ORDER_KIND_TRAIN:
            self.answer(order, accepted=pb.Accepted())
            if order.kind == pb.ORDER_KIND_BUILD:
                self.deliver(order, zero)
            else:
                self.answer(order, done=pb.Done())
        return order

    def upload(self) -> Upload:
        """Open an Upload call."""
        return Upload(
            self.channel.stream_stream(
                f"{SERVICE}/Upload", request_serializer=None, response_deserializer=pb.UploadResponse.FromString
            )
        )

    def deliver(self, order: pb.Order, tensors: "Tensors", examples: int = 10) -> pb.Receipt:
        """Upload a payload for an order from the offset that the server holds."""
        upload = self.upload()
        upload.begin(tensors.begin(order, examples=examples))
        upload.send(tensors.payload, upload.ready())
        return upload.receipt()

    def download(self, version: pb.Version, run_id: str, offset: int = 0) -> tuple[Manifest, bytes]:
        """Fetch a version from an offset: its manifest and the bytes from there on."""
        fetch: Any = self.channel.unary_stream(
            f"{SERVICE}/Download",
            request_serializer=pb.DownloadRequest.SerializeToString,
            response_deserializer=None,
        )
        request = pb.DownloadRequest(run_id=run_id, digest=version.digest, offset=offset)
        return read_payload(fetch(request, timeout=DEADLINE), offset)

    def close(self) -> None:
        """Break the connection, as a daemon that dies does."""
        self.channel.close()


def join_all(peers: Sequence[Peer], zero: "Tensors") -> list[pb.Order]:
    """Let peers join at the same time (a run waits for its quorum), and return their TRAIN orders."""
    for peer in peers:
        if peer.stream is None:
            peer.attach()
    with ThreadPoolExecutor(len(peers)) as pool:
        return list(pool.map(lambda peer: peer.join(zero), peers))


def read_payload(frames: Iterator[bytes], offset: int = 0) -> tuple[Manifest, bytes]:
    """Return the manifest and the bytes of a Download or ExportRun call."""
    reader, manifest = ManifestReader(), None
    while manifest is None:
        message = parse_download(next(frames))
        assert not isinstance(message, Piece)
        manifest = reader.take(message)
    data = bytearray()
    for frame in frames:
        piece = parse_download(frame)
        assert isinstance(piece, Piece)
        assert piece.offset == offset + len(data)
        data += piece.data
    return manifest, bytes(data)


@dataclass(frozen=True)
class Tensors:
    """A tensor set: its manifest and payload."""

    manifest: Manifest
    payload: bytes

    @classmethod
    def make(cls, folder: Path, value: float, elements: int = 700_000, config: str = "") -> "Tensors":
        """Make two float32 tensors of 2.7 MiB in all, so three chunks, that depend on ``value``."""
        half = elements // 2
        arrays = {
            "a.lora_A.weight": np.full((half, 1), value, np.float32),
            "b.lora_B.weight": np.linspace(0, value, elements - half, dtype=np.float32),
        }
        path = folder / f"payload-{value}"
        manifest = encode(arrays, ELEMENT_TYPE_FLOAT32, path, adapter_config=config)
        return cls(manifest, path.read_bytes())

    def begin(self, order: pb.Order, **changes: Any) -> pb.UploadBegin:  # noqa: ANN401 - fields
        """Return the announcement of this payload as the result of ``order``."""
        fields: dict[str, Any] = {
            "order_id": order.order_id,
            "run_id": order.run_id,
            "round": order.round,
            "base_digest": order.base.digest,
            "manifest": self.manifest,
            "examples": 10,
            "tokens": 100,
            "steps": 1,
        }
        return pb.UploadBegin(**{**fields, **changes})
