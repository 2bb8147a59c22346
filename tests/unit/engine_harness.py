"""A whole engine on a temporary folder, and members that answer its orders as daemons do, without a network."""

import asyncio
import atexit
import contextlib
import functools
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import numpy as np

from fsllm.v1 import control_pb2, federation_pb2
from fsllm.v1.tensors_pb2 import Manifest
from fsllm_common.errors import FsllmError
from fsllm_common.plan import Plan
from fsllm_common.telemetry.metrics import ServerMetrics
from fsllm_common.tensors.arrays import encode
from fsllm_common.tensors.manifest import WIRE_TYPES
from fsllm_server.engine.engine import Engine, Expected, Session
from fsllm_server.engine.retention import Retention
from fsllm_server.store.blobs import Blobs
from fsllm_server.store.database import Database
from fsllm_server.store.events import EventLog
from fsllm_server.store.spools import Spools

KINDS = {value: name.removeprefix("ORDER_KIND_").lower() for name, value in federation_pb2.OrderKind.items()}
SHAPES = {"layer.lora_A.weight": (4, 8), "layer.lora_B.weight": (8, 4)}


def make_plan(**changes: Any) -> Plan:  # noqa: ANN401
    """Return a plan of three noop rounds between two sites that gathers at once."""
    plan: dict[str, Any] = {
        "name": "test",
        "rounds": 3,
        "model": {"name": "synthetic"},
        "algorithm": {"name": "noop", "weighting": "examples"},
        "wire": {"element_type": "fp32"},
        "timing": {"gather_seconds": 0.01},
    }
    for key, value in changes.items():
        plan[key] = {**plan[key], **value} if isinstance(plan.get(key), dict) else value
    return Plan.model_validate(plan)


def arrays(value: float) -> dict[str, Any]:
    return {name: np.full(shape, value, np.float32) for name, shape in SHAPES.items()}


@functools.cache
def _fresh_database() -> Path:
    """Return a database that was migrated once for all tests: Alembic's child takes a second."""
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder)
    path = Path(folder) / "fresh.sqlite3"
    Database(f"sqlite:///{path}").close()
    return path


class Server:
    """The engine and its store, which ``restart`` replaces by new ones over the same folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.metrics = ServerMetrics()
        self.retention: Retention | None = None
        """For the next ``open``."""

    async def __aenter__(self) -> "Server":
        self.open()
        await self.engine.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.engine.stop()
        self.database.close()

    def open(self) -> None:
        path = self.folder / "db.sqlite3"
        if not path.exists():
            shutil.copy(_fresh_database(), path)
        self.database = Database(f"sqlite:///{path}")
        self.blobs = Blobs(self.folder / "blobs")
        self.spools = Spools(self.folder / "spools")
        self.engine = Engine(EventLog(self.database), self.blobs, self.spools, self.metrics, retention=self.retention)

    async def restart(self) -> None:
        await self.__aexit__()
        await self.__aenter__()

    async def until(
        self, run: str, seen: Callable[[control_pb2.WatchRunResponse], bool]
    ) -> control_pb2.WatchRunResponse:
        """Wait for a notice of a run, from its beginning."""
        async with asyncio.timeout(20), contextlib.aclosing(self.engine.watch(run, 0)) as notices:  # type: ignore[type-var]
            async for notice in notices:
                if seen(notice):
                    return notice
        raise AssertionError(f"the run ended first: {self.engine.get_run(run).message}")

    async def done(self, run: str) -> control_pb2.Run:
        await self.until(run, lambda notice: (notice.kind, notice.subject) == ("status", "done"))
        return self.engine.get_run(run)


class Member:
    """A daemon: attaches, keeps every order it got, and by default does what it is told."""

    def __init__(self, server: Server, name: str, *, role: str = "site", value: float = 1.0, examples: int = 1) -> None:
        self.server, self.name, self.role = server, name, role
        self.value, self.examples = value, examples
        self.orders: list[federation_pb2.Order] = []
        self.withdrawn: list[federation_pb2.Withdraw] = []
        self.held: list[str] = []
        self.error: FsllmError | None = None
        self.act: dict[str, Callable[[federation_pb2.Order], Any]] = {}
        """By kind: what to do instead; a coroutine function of the order."""
        self.task: asyncio.Task[None] | None = None
        self.arrived = asyncio.Condition()

    def attach(self, *, silent: str = "") -> "Member":
        """Attach, and from now on take orders of the kind ``silent`` without a word: the test does them."""
        if silent:
            self.act[silent] = self.nothing
        hello = federation_pb2.Hello(held_orders=self.held)
        self.session = self.server.engine.attach(self.name, self.role, hello)
        self.task = asyncio.create_task(self._serve(self.session))
        return self

    async def leave(self) -> None:
        self.session.close()
        assert self.task is not None
        await self.task

    async def order(self, kind: str, count: int = 1) -> federation_pb2.Order:
        """Wait for the count-th order of a kind."""
        async with asyncio.timeout(20), self.arrived:
            await self.arrived.wait_for(lambda: len(self.of(kind)) >= count)
        return self.of(kind)[count - 1]

    def of(self, kind: str) -> list[federation_pb2.Order]:
        return [order for order in self.orders if KINDS[order.kind] == kind]

    async def _serve(self, session: Session) -> None:
        try:
            async for response in session:
                async with self.arrived:
                    if response.WhichOneof("kind") == "withdraw":
                        self.withdrawn.append(response.withdraw)
                    else:
                        self.orders.append(response.order)
                    self.arrived.notify_all()
                if response.WhichOneof("kind") == "order":
                    kind = KINDS[response.order.kind]
                    await self.act.get(kind, getattr(self, f"do_{kind}"))(response.order)
        except FsllmError as error:
            self.error = error

    async def do_join(self, order: federation_pb2.Order) -> None:
        await self.answer(order, accepted=federation_pb2.Accepted())
        await self.answer(order, done=federation_pb2.Done())

    do_check = do_join

    async def do_evaluate(self, order: federation_pb2.Order) -> None:
        self.server.engine.blob(self.name, order.base.digest)
        metric = federation_pb2.Metric(name="loss", value=self.value, weight=1)
        await self.answer(order, done=federation_pb2.Done(metrics=[metric]))

    async def do_build(self, order: federation_pb2.Order) -> None:
        await self.upload(order, 0.0)

    async def do_train(self, order: federation_pb2.Order) -> None:
        await self.upload(order, self.value)

    async def nothing(self, order: federation_pb2.Order) -> None:
        """Take the order and stay silent."""

    async def fail(self, order: federation_pb2.Order) -> None:
        await self.answer(order, failed=federation_pb2.Failed(reason="WORKER_DIED", message="it died"))

    async def decline(self, order: federation_pb2.Order) -> None:
        await self.answer(order, declined=federation_pb2.Declined(reason="POLICY_REFUSED", message="not this model"))

    async def answer(self, order: federation_pb2.Order, **outcome: Any) -> None:  # noqa: ANN401
        await self.server.engine.answer(self.name, federation_pb2.Answer(order_id=order.order_id, **outcome))

    def payload(self, order: federation_pb2.Order, value: float) -> tuple[Manifest, bytes]:
        plan = Plan.model_validate_json(order.plan)
        path = self.server.folder / f"{self.name}.payload"
        config = '{"r": 4}' if KINDS[order.kind] == "build" else ""
        manifest = encode(arrays(value), WIRE_TYPES[plan.wire.element_type], path, adapter_config=config)
        return manifest, path.read_bytes()

    def begin(self, order: federation_pb2.Order, manifest: Manifest, **changes: Any) -> federation_pb2.UploadBegin:  # noqa: ANN401
        fields: dict[str, Any] = {
            "order_id": order.order_id,
            "run_id": order.run_id,
            "round": order.round,
            "base_digest": order.base.digest,
            "manifest": manifest,
            "examples": self.examples,
            "tokens": 10 * self.examples,
            "steps": 1,
            "metrics": [federation_pb2.Metric(name="epsilon", value=0.5, weight=1)],
        }
        return federation_pb2.UploadBegin(**{**fields, **changes})

    async def upload(self, order: federation_pb2.Order, value: float, **changes: Any) -> federation_pb2.Receipt:  # noqa: ANN401
        """Deliver a constant delta as the service does."""
        engine = self.server.engine
        manifest, payload = self.payload(order, value)
        expected = engine.expect_upload(self.name, self.begin(order, manifest, **changes))
        if isinstance(expected, federation_pb2.Receipt):
            return expected
        assert isinstance(expected, Expected)
        spool = self.server.spools.open(expected.run_id, expected.round, self.name, expected.manifest)
        with contextlib.closing(spool):
            spool.write(spool.offset, memoryview(payload)[spool.offset :])
            verified = await spool.verify(expected.manifest, max_norm=expected.max_norm)
        return await engine.record_upload(expected, verified)


@contextlib.asynccontextmanager
async def serving(folder: Path, retention: Retention | None = None) -> AsyncIterator[Server]:
    """Yield a started server."""
    server = Server(folder)
    server.retention = retention
    async with server:
        yield server
