"""The virtual server: everything that the real one puts together, but sockets, SQL and certificates' renewal.

The log and the members' records are the database's part: what they have returned from is durable, and when the server
dies meanwhile, nobody knows.
"""

import asyncio
import inspect
import os
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import grpc

from fsllm_common.errors import Refused, Unavailable
from fsllm_common.failpoints import reach
from fsllm_common.identity.names import Member, Role
from fsllm_server.engine.engine import Engine
from fsllm_server.service.attach import Attachments
from fsllm_server.service.control import ControlService
from fsllm_server.service.disk_quota import DiskQuota
from fsllm_server.service.downloads import Downloads
from fsllm_server.service.federation import FederationService
from fsllm_server.service.guard import Calls, Guard
from fsllm_server.service.pace import PaceLimits
from fsllm_server.service.rates import CallRate
from fsllm_server.service.uploads import Uploads
from fsllm_server.settings import ServerSettings
from fsllm_server.store.blobs import Blobs
from fsllm_server.store.events import Entry, RunRecord
from fsllm_server.store.members import MemberRecord
from fsllm_server.store.spools import Spools
from simulation.calls import Call, Details, Served
from simulation.identities import FEDERATION
from simulation.loop import CURRENT
from simulation.network import Connection
from simulation.seams import SERVER_METRICS

if TYPE_CHECKING:
    from simulation.world import World

T = TypeVar("T")


@dataclass
class Records:
    """The database: what is committed."""

    runs: dict[str, RunRecord] = field(default_factory=dict)
    logs: dict[str, list[Entry]] = field(default_factory=dict)
    members: dict[str, MemberRecord] = field(default_factory=dict)


class Log:
    """``EventLog`` over committed records."""

    def __init__(self, world: "World") -> None:
        self._world = world
        self._records = world.records

    async def submit(self, run: RunRecord, first: Entry) -> None:
        def work() -> None:
            assert run.id not in self._records.runs, "a run is submitted once"
            self._records.runs[run.id] = run
            self._records.logs[run.id] = [first]

        await self._commit(work)
        self._world.history.note("logged", kind=first.kind, run=run.id)

    async def append(self, run_id: str, entry: Entry) -> None:
        def work() -> None:
            log = self._records.logs[run_id]
            assert entry.sequence == len(log) + 1, "the table's key: run and sequence"
            log.append(entry)
            self._world.history.note("logged", kind=entry.kind, sequence=entry.sequence, run=run_id, body=entry.body)

        await self._commit(work)

    async def runs(self) -> list[RunRecord]:
        await asyncio.sleep(self._world.loop.pause())
        return sorted(self._records.runs.values(), key=lambda run: (run.created, run.id))

    async def replay(self, run_id: str) -> list[Entry]:
        await asyncio.sleep(self._world.loop.pause())
        return list(self._records.logs[run_id])

    async def _commit(self, work: Any) -> None:  # noqa: ANN401
        def transact() -> None:
            process = CURRENT.get()
            if process is not None and process.full_until > self._world.loop.now:
                raise Unavailable("DISK_FULL", "no space left for the database", retry_after=30)
            reach("database.commit")
            work()
            reach("database.committed")

        await asyncio.get_running_loop().run_in_executor(None, transact)


class Roll:
    """``Members`` over committed records."""

    def __init__(self, world: "World") -> None:
        self._world = world
        self._records = world.records.members

    def list(self) -> list[MemberRecord]:
        return [self._records[name] for name in sorted(self._records)]

    def get(self, name: str) -> MemberRecord | None:
        return self._records.get(name)

    def check(self, member: Member, serial: str) -> None:
        if self._records[member.name].standing == "revoked":
            raise Refused("MEMBER_REVOKED", f"{member.name} has been revoked")

    async def revoke(self, name: str) -> MemberRecord:
        def work() -> None:
            self._records[name] = replace(self._records[name], standing="revoked")
            self._world.history.note("revoked", member=name)

        await asyncio.get_running_loop().run_in_executor(None, work)
        return self._records[name]


class NoInvites:
    """Nobody is invited here."""

    async def withdraw(self, name: str) -> bool:
        return False


class Handlers:
    """Takes the place of grpc.aio's server while the services register."""

    def __init__(self) -> None:
        self.generic: list[grpc.GenericRpcHandler[Any, Any]] = []

    def add_generic_rpc_handlers(self, handlers: tuple[Any, ...]) -> None:
        self.generic.extend(handlers)

    def add_registered_method_handlers(self, service: str, handlers: dict[str, Any]) -> None:
        """The same as the generic ones."""

    async def find(self, details: Details) -> Any:  # noqa: ANN401
        return next((found for one in self.generic if (found := one.service(details)) is not None), None)


def enrolled(name: str, role: Role) -> MemberRecord:
    # A date of its own: it travels, and other digits are other bytes.
    return MemberRecord(name, role, "enrolled", datetime(2100, 1, 1, tzinfo=UTC))


def put_together(kind: type[T], parts: dict[str, Any]) -> T:
    """Make an object from the parts that its constructor names."""
    wanted = inspect.signature(kind).parameters
    return kind(**{name: parts[name] for name, one in wanted.items() if name in parts or one.default is one.empty})


async def serve(world: "World") -> None:
    """Be the server's main: open everything over the process's folder, replay, listen, and stay."""
    process = CURRENT.get()
    assert process is not None
    settings = ServerSettings(state_dir=process.folder, **world.script.server)
    parts: dict[str, Any] = {
        "settings": settings,
        "metrics": SERVER_METRICS,
        "federation": FEDERATION,
        "members": Roll(world),
        "invites": NoInvites(),
        "authority": None,
        "certificates": None,
        "life_of": settings.life_of,
        "log": Log(world),
        "clock": lambda: 1.7e9 + world.loop.now,
        "spools": Spools(process.folder / "spools"),
        "blobs": Blobs(process.folder / "blobs"),
        "slots": settings.uploads_at_once,
        "chunks": settings.uploads_at_once,  # as few, so that downloads wait for each other too
        "pace": PaceLimits(settings.upload_stall_seconds, bytes_per_second=1.0),
        "calls": Calls(settings.max_calls),
        "rate": CallRate(10_000),
        "quota": DiskQuota(process.folder / "spools", 1 << 30),
    }
    world.engine = parts["engine"] = put_together(Engine, parts)
    parts["attachments"] = put_together(Attachments, parts)
    parts["downloads"] = put_together(Downloads, parts)
    parts["uploads"] = put_together(Uploads, parts)
    handlers = Handlers()
    for service in (FederationService, ControlService):
        put_together(service, parts).add_to(handlers)  # type: ignore[attr-defined]
    guard = put_together(Guard, parts)
    await parts["engine"].start()

    def accept(connection: Connection, call: Call) -> Served:
        served = Served(world.network, connection, call)
        if call.method == "Upload":
            world.most("files", _open_files(process.folder / "spools"))
        details: Any = Details(call.path)
        served.start(process, lambda: guard.intercept_service(handlers.find, details))
        return served

    world.network.listen(process, accept)
    world.history.note("serving")
    await asyncio.get_running_loop().create_future()


def _open_files(folder: Path) -> int:
    """Return how many files in a folder are open."""
    opened = Path("/proc/self/fd")
    return sum(os.path.realpath(link).startswith(f"{folder}/") for link in opened.iterdir())
