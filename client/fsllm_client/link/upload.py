"""Delivering results: announced, queued, sent from the offset that the server holds, until there is a receipt."""

import asyncio
import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc

from fsllm.v1.federation_pb2 import (
    Receipt,
    UploadBegin,
    UploadRequest,
    UploadResponse,
    UploadStatusRequest,
    UploadStatusResponse,
)
from fsllm_client.link.channel import Link
from fsllm_client.link.retry import until_done
from fsllm_client.site.outbox import Parcel
from fsllm_common.errors import FsllmError, Unavailable
from fsllm_common.rpc_errors import error_from
from fsllm_common.telemetry.logs import get_logger
from fsllm_common.telemetry.metrics import ClientMetrics
from fsllm_common.tensors.chunks import CHUNK, read_chunks
from fsllm_common.tensors.manifest import payload_digest
from fsllm_common.tensors.parts import split_manifest

log = get_logger()

Advance = Callable[[str, int, int], None]
"""("queued", place, 0) or ("uploading", bytes done, bytes in all)."""


class Uploader:
    """Sends parcels over the link."""

    def __init__(self, link: Link, metrics: ClientMetrics) -> None:
        self._link = link
        self._metrics = metrics

    async def deliver(self, parcel: Parcel, advance: Advance = lambda activity, done, total: None) -> Receipt:
        """Return the server's receipt, however often the connection breaks.

        Raises:
            FsllmError: The server refuses the update, with its reason.

        """
        position = 0
        attempts = 0

        def advanced(activity: str, done: int, total: int) -> None:
            nonlocal position
            if activity == "uploading":
                position = done
            advance(activity, done, total)

        async def attempt() -> Receipt:
            nonlocal attempts
            attempts += 1
            # After a broken stream nobody knows here whether the last chunk was recorded: the server does.
            if attempts > 1 and (status := await self.status(parcel)).HasField("receipt"):
                return status.receipt
            try:
                return await self._send(parcel, advanced)
            except FsllmError as error:
                # Damage on the way is cured by sending again, damage on this disk is not.
                if error.reason == "DIGEST_MISMATCH" and not await asyncio.to_thread(_is_whole, parcel):
                    raise FsllmError("STATE_CORRUPT", f"{parcel.payload} is damaged: it is thrown away") from error
                raise

        return await until_done("an upload", attempt, lambda: position)

    async def status(self, parcel: Parcel) -> UploadStatusResponse:
        """Ask the server what it has of a parcel, and whether it still wants it.

        Raises:
            FsllmError: The server can not be asked now.

        """
        begin = parcel.begin
        request = UploadStatusRequest(run_id=begin.run_id, round=begin.round, digest=parcel.digest)
        try:
            return await self._link.stub.UploadStatus(request, wait_for_ready=True, timeout=30)
        except grpc.aio.AioRpcError as error:
            raise error_from(error) from error

    async def _send(self, parcel: Parcel, advance: Advance) -> Receipt:
        announced = time.monotonic()
        ready: float | None = None
        call = self._link.upload()
        try:
            for frame in _announcement(parcel.begin):
                await call.write(frame)
            async for response in call:
                match response.WhichOneof("kind"):
                    case "queued":
                        advance("queued", response.queued.place, 0)
                    case "ready":
                        ready = time.monotonic()
                        log.info(
                            "sending",
                            digest=parcel.digest.hex()[:12],
                            at_byte=response.ready.offset,
                            of=parcel.begin.manifest.payload_bytes,
                        )
                        self._metrics.upload_wait_seconds.observe(ready - announced)
                        await self._send_chunks(call, parcel, response.ready.offset, advance)
                    case "receipt":
                        if ready is not None:
                            self._metrics.upload_seconds.observe(time.monotonic() - ready)
                            self._metrics.upload_bytes.observe(response.receipt.payload_bytes)
                        return response.receipt
            raise Unavailable("SERVER_UNREACHABLE", "The upload ended without a receipt")
        except grpc.aio.AioRpcError as error:
            raise error_from(error) from error
        finally:
            call.cancel()

    async def _send_chunks(
        self, call: grpc.aio.StreamStreamCall[Any, UploadResponse], parcel: Parcel, offset: int, advance: Advance
    ) -> None:
        total = parcel.begin.manifest.payload_bytes
        try:
            for frame in read_chunks(parcel.payload, offset):
                await call.write(frame)
                size = min(CHUNK, total - offset)
                offset += size
                self._metrics.sent_bytes.inc(size)
                advance("uploading", offset, total)
            await call.done_writing()
        except asyncio.InvalidStateError:
            # The server has ended the call; reading it says why.
            log.debug("the server ended an upload before its last chunk", offset=offset)


def _announcement(begin: UploadBegin) -> Iterator[bytes]:
    """Yield begin, and the parts of its manifest when that is too large for one message."""
    first, parts = split_manifest(begin.manifest)
    if parts:
        whole, begin = begin, UploadBegin()
        begin.MergeFrom(whole)
        begin.manifest.CopyFrom(first)
    yield UploadRequest(begin=begin).SerializeToString()
    for part in parts:
        yield UploadRequest(part=part).SerializeToString()


def _is_whole(parcel: Parcel) -> bool:
    return payload_digest(parcel.begin.manifest, parcel.payload) == parcel.digest
