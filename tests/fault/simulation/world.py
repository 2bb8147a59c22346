"""One seed's world: its processes, their disks, what befalls them, and how it ends."""

import asyncio
import random
import shutil
import traceback
from collections import Counter
from collections.abc import Callable, Coroutine
from contextvars import Context
from pathlib import Path
from typing import Any

from fsllm_common.identity.names import Role
from simulation import arithmetic, script
from simulation.disk import Synced, after_kill, after_power_loss
from simulation.history import History
from simulation.liar import LIAR, lie
from simulation.loop import CURRENT, Killed, Loop, Process
from simulation.network import KEEPALIVE_SECONDS, Network, Weather
from simulation.server import Records, enrolled, serve
from simulation.site import Nature, live
from simulation.steering import OPERATOR, operate

MANY = 20
"""So many complaints are enough: the rest would say the same."""
Main = Callable[["World"], Coroutine[Any, Any, None]]


class World:
    """Everything there is. Make it, ``play`` it once, and let the checker look at it."""

    def __init__(self, seed: int, folder: Path, *, verbose: bool = False, rough: script.Rough = "") -> None:
        self.seed = seed
        self.verbose = verbose
        self.chance = random.Random(seed)  # noqa: S311 - it is to be repeatable
        self.loop = Loop(random.Random(self.chance.random()))  # noqa: S311
        self.history = History(self.loop, str(folder))
        self.history.overflow = self._overflow
        self.history.reached = self.reached
        self.synced = Synced()
        self.records = Records()
        self.network = Network(self.loop, random.Random(self.chance.random()), self.history)  # noqa: S311
        self.script = script.write(random.Random(self.chance.random()), rough)  # noqa: S311
        self.files = folder / "files"
        self.disks = folder / "disks"
        self.engine: Any = None
        self.processes: dict[str, Process] = {}
        self.mains: dict[str, Main] = {}
        self.quiet = False
        self.finished = asyncio.Event()
        """The operator has seen the run's end."""
        self.deltas: dict[tuple[str, str, int], list[tuple[Nature, dict[str, arithmetic.Array]]]] = {}
        """By site, run and round: what was trained, each time that it was."""
        self.inspect: Callable[[Path, bool], None] = lambda folder, power: None
        """The checker's look at the server's disk after a crash: the folder, whether power was lost."""
        self.complaints: list[str] = []
        """What the code itself calls a bug."""
        self.bounds: Counter[str] = Counter()
        self.examples = {nature.name: nature.examples for nature in (*self.script.natures, LIAR)}
        self._reached: Counter[tuple[str, str]] = Counter()

    # Processes.

    def begin(self, name: str, main: Main, folder: Path | None = None) -> None:
        """Start a process, the first time on an empty disk."""
        before = self.processes.get(name)
        if folder is None:
            folder = self.disks / name / "0"
            folder.mkdir(parents=True)
        process = self.processes[name] = Process(name, before.number + 1 if before else 0, folder)
        self.mains[name] = main
        self.history.note("start", who=name, number=process.number)
        task = self.loop.create_task(main(self), context=process.context.copy())
        task.add_done_callback(lambda _: self._ended(process, task), context=Context())

    def _ended(self, process: Process, task: "asyncio.Task[None]") -> None:
        if not process.alive:
            return
        if (error := task.exception()) is not None and not isinstance(error, Killed):
            self._complain(f"{process} ended with {error!r}")
        # Whoever runs a daemon has it started again; a revoked one stays out.
        revoked = (record := self.records.members.get(process.name)) is not None and record.standing == "revoked"
        if process.name != OPERATOR and not revoked:
            self.crash(process, "kill", 5.0, "its end")

    def crash(self, process: Process, how: str, seconds: float, where: str = "no failpoint") -> None:
        """End a process at this very instant; it starts again after a while on what is left of its disk."""
        self.history.note("crash", who=process.name, how=how, where=where)
        process.alive = False
        folder = process.folder.with_name(str(process.number + 1))
        if how == "power":
            chance = random.Random(self.chance.random())  # noqa: S311
            after_power_loss(process.folder, folder, self.synced, chance)
        else:
            after_kill(process.folder, folder, self.synced)
        if process.name == "server":
            self.history.server_died(power=how == "power")
            self.inspect(folder, how == "power")
        self.network.died(process, power=how == "power")
        self.later(seconds, self.begin, process.name, self.mains[process.name], folder)

    def later(self, seconds: float, callback: Callable[..., object], *args: object) -> None:
        """Call back in nobody's name."""
        self.loop.call_later(seconds, callback, *args, context=Context())

    def reached(self, point: str) -> None:
        """A process is at a failpoint."""
        process = CURRENT.get()
        if process is None or not process.alive:
            return
        self._reached[process.name, point] += 1
        self.history.counts[f"reached {point}"] += 1
        if self.quiet:
            return
        for arm in self.script.arms:
            if (arm.whom, arm.point, arm.count) == (process.name, point, self._reached[process.name, point]):
                self.history.counts[f"{arm.how} at {point}"] += 1
                if arm.how == "full":
                    self.history.note("full", point=point)
                    raise OSError(28, "No space left on device")
                self.crash(process, arm.how, self.chance.expovariate(1 / 8), point)
                raise Killed

    # What happens.

    def strike(self, fault: script.Fault) -> None:
        """Let a fault happen."""
        if self.quiet:
            return
        process, now = self.processes.get(fault.whom), self.loop.now
        if process is None or not process.alive:
            return
        weather = self.network.weather[fault.whom]
        if fault.kind in ("kill", "power"):
            self.crash(process, fault.kind, fault.seconds)
            return
        self.history.note("fault", who=fault.whom, kind=fault.kind, seconds=round(fault.seconds, 2))
        until = min(now + fault.seconds, self.script.quiet_at)
        match fault.kind:
            case "freeze":
                process.frozen_until = until
                if until - now > KEEPALIVE_SECONDS:
                    self.later(KEEPALIVE_SECONDS, self._unheard, process)
            case "full":
                process.full_until = until
            case "cut" | "silence" if (connection := self.network.connections.get(process)) is not None:
                if fault.kind == "silence":
                    connection.go_silent()
                elif self.chance.random() < 0.5:
                    connection.jam()
                else:
                    connection.cut()
            case "stall":
                weather.stalled_until = until
            case "slow":
                weather.bytes_per_second = 20.0
            case "unreachable":
                weather.unreachable_until = until
                if (connection := self.network.connections.get(process)) is not None:
                    connection.go_silent()
            case _:
                pass

    def _unheard(self, process: Process) -> None:
        """Nobody waits longer for an answer of a process that is stopped."""
        self.network.died(process, power=True)

    def _calm(self) -> None:
        self.history.note("quiet")
        self.quiet = True
        for nature in self.script.natures:
            nature.fails = nature.stalls = 0.0
            nature.step_seconds = min(nature.step_seconds, 1.0)
        for name in self.network.weather:
            self.network.weather[name] = Weather()
        for connection in self.network.connections.values():
            connection.calm(self.network.weather[connection.client.name])

    def trained(self, nature: Nature, run: str, round_: int) -> dict[str, arithmetic.Array]:
        """Make up a delta, another one each time, and remember it."""
        made = self.deltas.setdefault((nature.name, run, round_), [])
        delta = arithmetic.numbers(f"{self.seed} {nature.name} {round_} {len(made)}", 0.1)
        made.append((nature, {name: array.copy() for name, array in delta.items()}))
        self.history.note("trained", run=run, round=round_, times=len(made))
        return delta

    def tasks_of(self, name: str) -> int:
        """Return how many tasks of a process have not ended."""
        process = self.processes[name]
        return sum(not task.done() and task.process is process for task in self.loop.tasks)

    def most(self, what: str, count: int) -> None:
        """Keep the largest count."""
        self.bounds[what] = max(self.bounds[what], count)

    def logged(self, level: str, event: Any) -> None:  # noqa: ANN401
        """The code logs something."""
        if level in ("error", "critical"):
            raised = traceback.format_exc(limit=-4) if event.get("exc_info") else ""
            self._complain(f"{event.get('event')} ({event}) {raised}")
        if self.verbose:
            self.history.note("log", level=level, said=dict(sorted(event.items())))

    def _overflow(self) -> None:
        self.history.note("stuck")
        self.finished.set()

    def _complain(self, what: str) -> None:
        self.complaints.append(what)
        if len(self.complaints) > MANY:
            self.finished.set()

    # From beginning to end.

    def play(self) -> None:
        """Play the seed."""
        self.files.mkdir(parents=True)
        (self.files / "data").touch()
        (self.files / "model").mkdir()
        (self.files / "model" / "config.json").write_text("{}")
        for name in ("server", OPERATOR, LIAR.name, *(nature.name for nature in self.script.natures)):
            self.network.weather[name] = Weather(
                latency=self.chance.choice([0.001, 0.02, 0.2]),
                bytes_per_second=self.chance.choice([200.0, 2000.0, 1e6]),
            )
        self.loop.run_until_complete(self.loop.create_task(self._play(), context=Context()))

    def _wrong(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if not isinstance(error, Killed):
            self._complain(f"{context.get('message')}: {error!r}")

    async def _play(self) -> None:
        self.loop.set_exception_handler(self._wrong)
        self.records.members[OPERATOR] = enrolled(OPERATOR, Role.OPERATOR)
        self.begin("server", serve)
        self.begin(OPERATOR, operate)
        for nature in self.script.natures:
            self.records.members[nature.name] = enrolled(nature.name, nature.role)
            self.later(self.chance.expovariate(1 / 2), self.begin, nature.name, _main(nature))
        if self.script.liar:
            self.records.members[LIAR.name] = enrolled(LIAR.name, Role.SITE)
            self.later(1.0, self.begin, LIAR.name, lie)
        for fault in self.script.faults:
            self.later(fault.at, self.strike, fault)
        self.later(self.script.quiet_at, self._calm)
        try:
            async with asyncio.timeout(self.script.quiet_at + script.PATIENCE):
                await self.finished.wait()
        except TimeoutError:
            self.history.note("stuck")

    def close(self) -> None:
        """Let everything go; whatever unwinds now unwinds for nobody."""
        for task in self.loop.tasks:
            task._log_destroy_pending = False  # type: ignore[attr-defined] # of asyncio's tasks
        self.loop.set_exception_handler(lambda loop, context: None)
        shutil.rmtree(self.disks.parent, ignore_errors=True)


def _main(nature: Nature) -> Main:
    return lambda world: live(world, nature)
