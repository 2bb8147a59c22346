"""The channel to the server and its stubs. A renewed certificate means a new channel; calls on the old one run out."""

import asyncio
from typing import TYPE_CHECKING, Final

import grpc

from fsllm.v1 import federation_pb2
from fsllm.v1.federation_pb2_grpc import FederationServiceStub
from fsllm_common.identity.credentials import CHANNEL_OPTIONS, channel_credentials, with_keepalive
from fsllm_common.identity.keys import Credential

if TYPE_CHECKING:
    from fsllm.v1.federation_pb2 import DownloadRequest, UploadResponse
    from fsllm.v1.federation_pb2_grpc import FederationServiceAsyncStub

DRAIN_SECONDS: Final = 600.0
"""A transfer on a channel whose certificate was renewed has so long to end; then it goes on, on the new one."""

_OPTIONS: Final = (
    *CHANNEL_OPTIONS,
    # gRPC reconnects by itself, and so do we: its waits are kept below ours.
    ("grpc.initial_reconnect_backoff_ms", 100),
    # So long a connection may take to come about: TLS over a satellite needs three round trips.
    ("grpc.min_reconnect_backoff_ms", 5_000),
    ("grpc.max_reconnect_backoff_ms", 2_000),
)
_SERVICE: Final = federation_pb2.DESCRIPTOR.services_by_name["FederationService"].full_name


class Link:
    """The way to one server. Used from one event loop."""

    def __init__(self, server: str, credential: Credential, keepalive_seconds: float = 30.0) -> None:
        """Open nothing yet: the first call connects.

        Args:
            server: ``host:port``.
            credential: This member's.
            keepalive_seconds: Of silence, before the server is asked whether it is still there.

        """
        self.server = server
        self._options = with_keepalive(_OPTIONS, keepalive_seconds)
        self.credential = credential
        self.changed = asyncio.Event()
        """Set when the channel was replaced; whoever holds a long stream opens it anew and clears this."""
        self._draining: set[asyncio.Task[None]] = set()
        self._connect()

    def _connect(self) -> None:
        self._channel = grpc.aio.secure_channel(
            self.server, channel_credentials(self.credential), options=self._options
        )
        self.stub: FederationServiceAsyncStub = FederationServiceStub(self._channel)
        # Chunks travel as bytes that we frame and parse ourselves: a copy less, a fifth of a round's time.
        self._download: grpc.aio.UnaryStreamMultiCallable[DownloadRequest, bytes] = self._channel.unary_stream(
            f"/{_SERVICE}/Download", request_serializer=federation_pb2.DownloadRequest.SerializeToString
        )
        self._upload: grpc.aio.StreamStreamMultiCallable[bytes, UploadResponse] = self._channel.stream_stream(
            f"/{_SERVICE}/Upload", response_deserializer=federation_pb2.UploadResponse.FromString
        )

    def download(self, request: "DownloadRequest") -> "grpc.aio.UnaryStreamCall[DownloadRequest, bytes]":
        """Begin a download; each message is a serialised DownloadResponse."""
        return self._download(request)

    def upload(self) -> "grpc.aio.StreamStreamCall[bytes, UploadResponse]":
        """Begin an upload; each message written is a serialised UploadRequest."""
        return self._upload()

    def replace(self, credential: Credential) -> None:
        """Go on with a renewed certificate, on a new channel; what runs on the old one may end there."""
        old = self._channel
        self.credential = credential
        self._connect()
        self.changed.set()
        task = asyncio.create_task(old.close(grace=DRAIN_SECONDS))
        self._draining.add(task)
        task.add_done_callback(self._draining.discard)

    async def close(self) -> None:
        """Close everything, at once."""
        for task in tuple(self._draining):
            task.cancel()
        await asyncio.gather(*self._draining, return_exceptions=True)
        await self._channel.close()
