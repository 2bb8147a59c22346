"""Uploads, chunk by chunk, as raw protobuf frames (see ``fsllm_common.tensors.chunks``)."""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Final
from weakref import WeakValueDictionary

from fsllm.v1.federation_pb2 import Queued, Ready, Receipt, UploadBegin, UploadResponse
from fsllm.v1.tensors_pb2 import ManifestPart
from fsllm_common.errors import FsllmError, Unavailable, UpdateRejected
from fsllm_common.failpoints import reach
from fsllm_common.telemetry.logs import bind, get_logger
from fsllm_common.telemetry.metrics import ServerMetrics
from fsllm_common.tensors.chunks import CHUNK, Piece, parse_upload
from fsllm_common.tensors.parts import ManifestReader
from fsllm_server.engine.engine import Engine, Expected
from fsllm_server.service.admission import Admission
from fsllm_server.service.disk_quota import DiskQuota
from fsllm_server.service.guard import Call, this_call
from fsllm_server.service.pace import Pace, PaceLimits
from fsllm_server.service.screening import screen_begin
from fsllm_server.store.spools import Spool, Spools

log = get_logger()

INTERRUPTED: Final = frozenset({"NOT_WANTED", "OFFSET_OUT_OF_RANGE", "SITE_IDLE", "QUOTA_EXCEEDED"})
"""Reasons that end a stream but say nothing against the update: the site may go on where it stood."""


class Uploads:
    """Takes uploads in: one slot each, at most one stream for what a site sends in a run."""

    def __init__(
        self, engine: Engine, spools: Spools, slots: int, pace: PaceLimits, quota: DiskQuota, metrics: ServerMetrics
    ) -> None:
        self._engine = engine
        self._spools = spools
        self._admission = Admission(slots, metrics)
        self._pace = pace
        self._quota = quota
        self._metrics = metrics
        self._streams: dict[tuple[str, str], Call] = {}
        """By member and run: the stream that a later one takes over from, until all its bytes are here."""
        self._turns: WeakValueDictionary[tuple[str, str], asyncio.Lock] = WeakValueDictionary()
        """By member and run: held by the one stream that has a file open, until what it sent is recorded or refused."""
        self._concluding: set[asyncio.Task[Receipt]] = set()

    async def take(self, member: str, requests: AsyncIterator[bytes]) -> AsyncGenerator[UploadResponse]:
        """Serve one Upload call.

        Raises:
            FsllmError: As the contract lists them.

        """
        begin = await self._begin(requests)
        bind(run=begin.run_id, round=begin.round)
        call, own = this_call(), (member, begin.run_id)
        if (before := self._streams.get(own)) is not None:
            before.end(FsllmError("NOT_WANTED", "Another stream of this site has taken the upload over"))
        self._streams[own] = call
        try:
            expected = self._expect(member, begin)
            if isinstance(expected, Receipt):
                yield UploadResponse(receipt=expected)
                return
            announced = time.monotonic()
            with self._admission.join() as ticket:
                async for place in ticket.places():
                    # It is the server that is busy, not the site that is idle.
                    self._engine.touch(member, begin.run_id)
                    yield UploadResponse(queued=Queued(place=place))
                self._metrics.upload_wait_seconds.observe(time.monotonic() - announced)
                await self._complete(begin, requests)
                async with AsyncExitStack() as held:
                    turn = self._turns.setdefault(own, asyncio.Lock())
                    await turn.acquire()
                    held.callback(turn.release)
                    # Meanwhile the round may have closed, or another stream may have delivered.
                    expected = self._expect(member, begin)
                    if isinstance(expected, Receipt):
                        yield UploadResponse(receipt=expected)
                        return
                    there = self._spools.offset(expected.run_id, expected.round, member, expected.manifest.digest)
                    self._quota.demand(member, expected.manifest.payload_bytes - there)
                    admitted = time.monotonic()
                    spool = self._spools.open(expected.run_id, expected.round, member, expected.manifest)
                    held.callback(spool.close)
                    log.info("receiving", digest=spool.path.name[:12], at_byte=spool.offset, of=spool.size)
                    yield UploadResponse(ready=Ready(offset=spool.offset))
                    async with self._rejecting(expected):
                        await self._write(expected, spool, requests)
                    # A stream that comes from now on hears what has become of it.
                    self._forget(own, call)
                    # What is here is judged to the end, whether its sender waits for that or not: were this cut off,
                    # the next stream would open the file while threads still sync and read it.
                    receipt = await asyncio.shield(self._concluded(expected, spool, held.pop_all()))
                self._metrics.upload_seconds.observe(time.monotonic() - admitted)
                self._metrics.upload_bytes.observe(receipt.payload_bytes)
            reach("receipt.send")
            yield UploadResponse(receipt=receipt)
            reach("receipt.sent")
        finally:
            self._forget(own, call)

    def _concluded(self, expected: Expected, spool: Spool, held: AsyncExitStack) -> asyncio.Task[Receipt]:
        """Verify and record an upload, and let go of what is held for it, in a task of its own."""

        async def conclude() -> Receipt:
            async with held:
                async with self._rejecting(expected):
                    verified = await spool.verify(expected.manifest, max_norm=expected.max_norm)
                return await self._engine.record_upload(expected, verified)

        task = asyncio.create_task(conclude())
        self._concluding.add(task)
        task.add_done_callback(self._conclusion_is_known)
        return task

    def _conclusion_is_known(self, task: asyncio.Task[Receipt]) -> None:
        self._concluding.discard(task)
        if not task.cancelled():
            task.exception()  # a sender that is still there is told; for one that is not, there is nobody to tell

    def _forget(self, own: tuple[str, str], call: Call) -> None:
        if self._streams.get(own) is call:
            del self._streams[own]

    async def _begin(self, requests: AsyncIterator[bytes]) -> UploadBegin:
        async with self._deadline():
            wire = await anext(requests, None)
        begin = parse_upload(wire) if wire is not None else None
        if not isinstance(begin, UploadBegin):
            raise UpdateRejected("MANIFEST_INVALID", "The first message of Upload must be begin")
        screen_begin(begin)
        return begin

    async def _complete(self, begin: UploadBegin, requests: AsyncIterator[bytes]) -> None:
        """Read the rest of a manifest that is too large for one message: not before there is a slot for it."""
        reader = ManifestReader()
        whole = reader.take(begin.manifest)
        async with self._deadline():
            while whole is None:
                wire = await anext(requests, None)
                part = parse_upload(wire) if wire is not None else None
                if not isinstance(part, ManifestPart):
                    raise UpdateRejected("MANIFEST_INVALID", "The parts of the manifest come after begin")
                whole = reader.take(part)

    def _expect(self, member: str, begin: UploadBegin) -> Expected | Receipt:
        try:
            return self._engine.expect_upload(member, begin)
        except FsllmError as error:
            self._metrics.updates_rejected.labels(error.reason).inc()
            raise

    @asynccontextmanager
    async def _rejecting(self, expected: Expected) -> AsyncGenerator[None]:
        """Tell those who watch of a refusal that says something against the update."""
        try:
            yield
        except FsllmError as error:
            if error.reason not in INTERRUPTED:
                await self._engine.reject_upload(expected, error)
            raise

    async def _write(self, expected: Expected, spool: Spool, requests: AsyncIterator[bytes]) -> None:
        """Write the chunks.

        Raises:
            FsllmError: CHUNK_CORRUPT, OFFSET_OUT_OF_RANGE, SITE_IDLE, DISK_FULL, MANIFEST_INVALID, ...

        """
        with Pace(self._pace, this_call()) as pace:
            while (wire := await anext(requests, None)) is not None:
                piece = parse_upload(wire)
                if not isinstance(piece, Piece):
                    raise UpdateRejected("MANIFEST_INVALID", "begin comes once, before the chunks")
                size = len(piece.data)
                # Full chunks only: small ones would cost the server more than they cost the site.
                if size != min(CHUNK, expected.manifest.payload_bytes - piece.offset):
                    raise UpdateRejected("MANIFEST_INVALID", f"A chunk of {size} bytes at {piece.offset} is not 1 MiB")
                # Into the page cache, on the loop: a thread would cost more time than the copy.
                spool.write(piece.offset, piece.data)
                self._metrics.received_bytes.inc(size)
                self._engine.touch(expected.member, expected.run_id)
                pace.advanced(size)

    @asynccontextmanager
    async def _deadline(self) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(self._pace.stall_seconds):
                yield
        except TimeoutError:
            message = f"Nothing was announced for {self._pace.stall_seconds:g} seconds"
            raise Unavailable("SITE_IDLE", message, retry_after=1.0) from None
