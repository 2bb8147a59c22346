"""A member that lies: it speaks the protocol well, and says what is not so."""

import asyncio
import json
from collections import Counter
from typing import TYPE_CHECKING, Any

import grpc

from fsllm.v1 import control_pb2
from fsllm.v1.federation_pb2 import (
    Accepted,
    Answer,
    AttachRequest,
    AttachResponse,
    Done,
    DownloadRequest,
    Failed,
    Hello,
    Order,
)
from fsllm_common import PROTOCOL_VERSION
from fsllm_common.identity.names import Role
from fsllm_common.rpc_errors import error_from
from simulation.calls import Call
from simulation.history import KINDS
from simulation.identities import identity
from simulation.lies import LIES, TOO_LARGE, Lie, Update, announce, describe_arrays
from simulation.link import Link
from simulation.site import Nature

if TYPE_CHECKING:
    from simulation.world import World

LIAR = Nature("mallory", examples=13)
CIRCUMSTANCES = frozenset(
    {
        "SERVER_UNREACHABLE",
        "SERVER_STOPPING",
        "MEMBER_REVOKED",
        "BUSY",
        "QUOTA_EXCEEDED",
        "SITE_IDLE",
        "TOO_SLOW",
        "DISK_FULL",
        "NOT_WANTED",
        "ROUND_CLOSED",
        "ALL_HELD",
    }
)
"""What may come between: the connection breaks, or the round has gone on without the liar."""
SECONDS = 30.0


class AllHeldError(Exception):
    """The server has every byte of an honest attempt already: there is nothing to lie with."""


async def lie(world: "World") -> None:
    """Be the liar's main."""
    await Liar(world).work()


class Liar:
    """Attaches, and answers orders in its own way."""

    def __init__(self, world: "World") -> None:
        self._world = world
        self._link = Link(world, identity(Role.SITE, LIAR.name))
        self._at_work: set[asyncio.Task[None]] = set()
        self._announced: Counter[str] = Counter()
        """How often each update was announced as it is, by its digest: any of these uploads may be the recorded one."""
        self._call: Call

    async def work(self) -> None:
        while True:
            try:
                await self._attach()
            except grpc.aio.AioRpcError as error:
                if error_from(error).reason == "MEMBER_REVOKED":
                    return
            except asyncio.InvalidStateError:
                pass  # the stream has ended while something was written
            for task in self._at_work:
                task.cancel()
            self._at_work.clear()
            await asyncio.sleep(1.0)

    async def _attach(self) -> None:
        if self._world.chance.random() < 0.1:
            await self._try("no hello", self._no_hello(), {"HELLO_EXPECTED"})
        self._call = call = self._link.Attach()
        try:
            await call.write(AttachRequest(hello=Hello(protocol_version=PROTOCOL_VERSION, software_version="0")))
            beating = asyncio.create_task(self._beat(call))
            self._at_work.add(beating)
            async for response in call:
                if isinstance(response, AttachResponse) and response.WhichOneof("kind") == "order":
                    task = asyncio.create_task(self._carry_out(response.order))
                    self._at_work.add(task)
        finally:
            call.cancel()

    async def _beat(self, call: Call) -> None:
        while not call.done():
            await asyncio.sleep(15.0)
            await self._say(AttachRequest(heartbeat={}))

    async def _say(self, request: AttachRequest) -> None:
        if not self._call.done():
            await self._call.write(request)

    async def _carry_out(self, order: Order) -> None:
        await self._say(AttachRequest(answer=Answer(order_id=order.order_id, accepted=Accepted())))
        answer = Answer(order_id=order.order_id, done=Done())
        if KINDS[order.kind] == "build" or (KINDS[order.kind] == "train" and not await self._train(order)):
            answer = Answer(order_id=order.order_id, failed=Failed(reason="WORKER_DIED", message="it did not"))
        elif KINDS[order.kind] == "train":
            return
        await self._say(AttachRequest(answer=answer))

    async def _train(self, order: Order) -> bool:
        """Lie a few times; then, by chance, deliver. Return whether anything was delivered."""
        world = self._world
        plan = world.script.plan
        kind = plan.wire.element_type
        arrays = world.trained(LIAR, order.run_id, order.round)
        if plan.pipeline:  # whoever delivers must have clipped
            arrays = {name: array * 0.3 for name, array in arrays.items()}
        manifest, payload = describe_arrays(arrays, kind)
        world.history.honest[manifest.digest.hex()] = payload
        honest = Update(announce(order, manifest, LIAR.examples), payload, honest=True)
        if not world.quiet:
            await self._other_calls(order)
            for name in world.chance.sample(sorted(LIES), 3):
                if await self._upload_lie(name, *LIES[name], honest, kind) == "OK":
                    return True  # the missing chunk was there: it is delivered
            if plan.pipeline or plan.wire.max_update_norm is not None:
                reasons = frozenset({"NORM_TOO_LARGE"}) | ({"NOT_FINITE"} if kind == "fp16" else set())
                await self._upload_lie("a large norm", TOO_LARGE, reasons, honest, kind)
            if world.chance.random() < 0.3:
                await asyncio.sleep(world.chance.uniform(0, 100))
        if world.chance.random() < 0.3:
            return False
        self._announced[manifest.digest.hex()] += 1
        got = await self._outcome(self._deliver(honest))
        if got == "OK":
            name = world.chance.choice(["NaN", "Inf", "another digest"])
            await self._upload_lie(f"{name} afterwards", LIES[name][0], frozenset({"UPDATE_CONFLICT"}), honest, kind)
        return got == "OK"

    async def _upload_lie(self, name: str, change: Lie, expected: frozenset[str], honest: Update, kind: str) -> str:
        changed = change(honest, kind)
        # Lies in the chunks are told under the digest of the honest update: that is not recorded by them either.
        own = changed.begin.manifest.digest != honest.begin.manifest.digest
        digest = changed.begin.manifest.digest.hex() if own else None
        truth, announced = honest.begin.manifest.digest.hex(), int(changed.begin == honest.begin)
        self._announced[truth] += announced
        got = await self._outcome(self._deliver(changed))
        # By a second order that was worked on beside the first, or by a stream that broke off when all was there, but
        # not by this lie. Whoever names its digest gets its receipt, whatever else they say.
        recorded = self._recorded(honest)
        if recorded == truth and self._announced[truth] > announced:
            expected |= {"UPDATE_CONFLICT"} if own else {"UPDATE_CONFLICT", "OK"}
        elif recorded not in (None, truth):
            expected |= {"UPDATE_CONFLICT"}
        return self._note(name, got, expected, digest)

    def _recorded(self, update: Update) -> str | None:
        """Return the digest of what is recorded of the liar in this update's round."""
        for entry in self._world.records.logs[update.begin.run_id]:
            body = json.loads(entry.body) if entry.kind == "update" else {}
            if (body.get("member"), body.get("round")) == (LIAR.name, update.begin.round):
                return str(body["digest"])
        return None

    async def _other_calls(self, order: Order) -> None:
        fetch = DownloadRequest(run_id=order.run_id, digest=bytes(32))
        await self._try("an unknown blob", self._read(self._link.download(fetch)), {"BLOB_UNKNOWN"})
        fetch = DownloadRequest(run_id=order.run_id, digest=order.base.digest, offset=1 << 30)
        await self._try("a far offset", self._read(self._link.download(fetch)), {"OFFSET_OUT_OF_RANGE"})
        cancel = control_pb2.CancelRunRequest(run_id=order.run_id)
        operator = self._link.control("CancelRun", cancel, control_pb2.CancelRunResponse)
        await self._try("an operator's call", operator, {"ROLE_FORBIDDEN"})

    async def _deliver(self, update: Update) -> None:
        call = self._link.upload()
        try:
            await call.write(update.opening)
            async for response in call:
                if response.WhichOneof("kind") == "ready":
                    if response.ready.offset == len(update.payload) and not update.honest:
                        raise AllHeldError
                    for frame in update.chunks(response.ready.offset):
                        await call.write(frame)
                    await call.done_writing()
                if response.WhichOneof("kind") == "receipt":
                    return
        except asyncio.InvalidStateError:
            await call.read()
        finally:
            call.cancel()

    async def _no_hello(self) -> None:
        call = self._link.Attach()
        try:
            await call.write(AttachRequest(heartbeat={}))
            await call.read()
        finally:
            call.cancel()

    async def _read(self, call: Call) -> None:
        try:
            async for _ in call:
                pass
        finally:
            call.cancel()

    async def _try(self, name: str, trying: Any, expected: Any) -> str:  # noqa: ANN401
        return self._note(name, await self._outcome(trying), expected)

    def _note(self, name: str, got: str, expected: Any, digest: str | None = None) -> str:  # noqa: ANN401
        self._world.history.note("lie", name=name, got=got, expected=frozenset(expected) | CIRCUMSTANCES, digest=digest)
        self._world.history.counts[f"lie: {name}: {got}"] += 1
        return got

    async def _outcome(self, trying: Any) -> str:  # noqa: ANN401
        """Return the reason with which something was refused, or OK."""
        try:
            async with asyncio.timeout(SECONDS):
                await trying
        except grpc.aio.AioRpcError as error:
            return error_from(error).reason
        except TimeoutError:
            return "SERVER_UNREACHABLE"
        except AllHeldError:
            return "ALL_HELD"
        return "OK"
