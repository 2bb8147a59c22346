"""Downloads, chunk by chunk, as raw protobuf frames (see ``fsllm_common.tensors.chunks``)."""

import asyncio
import time
from collections import defaultdict
from collections.abc import AsyncGenerator
from contextlib import aclosing, closing

from fsllm.v1.federation_pb2 import DownloadRequest, DownloadResponse
from fsllm_common.telemetry.metrics import ServerMetrics
from fsllm_common.tensors.chunks import CHUNK, read_chunks, refuse_offset
from fsllm_common.tensors.parts import split_manifest
from fsllm_server.engine.engine import Engine
from fsllm_server.service.guard import this_call
from fsllm_server.service.pace import Pace, PaceLimits
from fsllm_server.store.blobs import StoredVersion


async def send_version(stored: StoredVersion, offset: int = 0) -> AsyncGenerator[bytes]:
    """Yield the manifest's frame, then the payload's chunks from ``offset``.

    The frames are those of DownloadResponse and of ExportRunResponse alike.

    Raises:
        FsllmError: OFFSET_OUT_OF_RANGE.

    """
    # Before anything is sent, so that a wrong offset is told instead.
    size = stored.payload.stat().st_size
    refuse_offset(offset, size)
    manifest, parts = split_manifest(stored.manifest)
    yield DownloadResponse(manifest=manifest).SerializeToString()
    for part in parts:
        yield DownloadResponse(part=part).SerializeToString()
    # Chunks come from the page cache in less time than a thread would take to wake up. None has a name here: what waits
    # for its next turn would keep it.
    with closing(read_chunks(stored.payload, offset)) as chunks:
        for _ in range(-(-(size - offset) // CHUNK)):
            yield next(chunks)


class Downloads:
    """Sends versions to members. Memory stays bounded because only so many chunks are on their way at a time.

    A member has one of them at most, whatever number of streams it opens, and all take turns: those with slow lines
    delay the others, but do not keep them out.
    """

    def __init__(self, engine: Engine, chunks: int, pace: PaceLimits, metrics: ServerMetrics) -> None:
        self._engine = engine
        self._chunks = asyncio.Semaphore(chunks)
        self._members: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._pace = pace
        self._metrics = metrics

    async def send(self, member: str, request: DownloadRequest) -> AsyncGenerator[bytes]:
        """Serve one Download call.

        Raises:
            FsllmError: As the contract lists them.

        """
        began = time.monotonic()
        stored = self._engine.blob(member, request.digest)
        with Pace(self._pace, this_call()) as pace:
            async with aclosing(send_version(stored, request.offset)) as frames:
                size = 1
                while size:
                    async with self._members[member], self._chunks:
                        frame = await anext(frames, b"")
                        if size := len(frame):
                            yield frame
                        del frame  # not kept while the others have their turns
                    # A frame is asked for when gRPC has taken the last one: a reader that stops is cut off.
                    pace.advanced(size)
                    self._metrics.sent_bytes.inc(size)
                    self._engine.touch(member, request.run_id)
        self._metrics.download_seconds.observe(time.monotonic() - began)
