"""The network between virtual processes: one connection a client process, many calls on it, as HTTP/2 has it.

Each direction of a connection is a pipe: messages arrive in order, after a latency and at a bandwidth. A pipe may
stall (everything arrives late), a connection may be cut (both ends are told, after a while) or go silent (half-open:
nothing arrives any more, and each end finds out when its keepalive is not answered). Nothing is lost in the middle of
a connection. Of one that is cut the middle (a proxy, a kernel's buffer) may deliver to the server late what it holds
already: after its caller has tried again by another connection, so that messages are repeated and out of order.
"""

import random
from asyncio import TimerHandle
from collections import deque
from collections.abc import Callable
from contextvars import Context
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from simulation.loop import CURRENT, Loop, Process

if TYPE_CHECKING:
    from simulation.calls import Call, Served
    from simulation.history import History

KEEPALIVE_SECONDS: Final = 40.0
"""After so long in silence an end gives a connection up: keepalive time and timeout of the real channels."""
CONNECT_SECONDS: Final = 20.0
"""After so long without an answer connecting is given up."""


@dataclass
class Weather:
    """How the network fares for one member; changed by faults."""

    latency: float = 0.005
    bytes_per_second: float = 1e6
    stalled_until: float = 0.0
    unreachable_until: float = 0.0
    """New connections are swallowed until then."""


@dataclass
class Pipe:
    """One direction of a connection."""

    waiting: deque[tuple[float, Callable[[], None]]] = field(default_factory=deque)
    free_at: float = 0.0
    next: TimerHandle | None = None
    """Set while the first of those that wait is on its way."""


class Network:
    """Who listens, and how everyone is connected to it."""

    def __init__(self, loop: Loop, chance: random.Random, history: "History") -> None:
        self.loop = loop
        self.chance = chance
        self.history = history
        self.weather: dict[str, Weather] = {}
        self.server: Process | None = None
        """The process that listens."""
        self.serve: Callable[[Connection, Call], Served] | None = None
        """Starts the server's side of a call, in the server's context."""
        self.connections: dict[Process, Connection] = {}
        """The newest one of each client process."""
        self.accepted: dict[Connection, None] = {}
        """Those that the server still holds."""

    def connection(self, client: Process) -> "Connection":
        """Return a client's connection; a new one when the last is broken."""
        found = self.connections.get(client)
        if found is None or found.broken:
            found = self.connections[client] = Connection(self, client, self.weather[client.name])
        return found

    def listen(self, server: Process, serve: "Callable[[Connection, Call], Served]") -> None:
        self.server, self.serve = server, serve

    def died(self, process: Process, *, power: bool) -> None:
        """The process is gone: its kernel resets its connections, unless the whole host is gone."""
        mine = [one for one in {**dict.fromkeys(self.connections.values()), **self.accepted} if process in one.ends]
        for one in mine:
            if power:
                one.go_silent()
            else:
                one.cut()

    def later(self, seconds: float, callback: Callable[..., object], *args: object) -> TimerHandle:
        """Call back in nobody's name: what is on its way arrives, whoever has died."""
        return self.loop.call_later(seconds, callback, *args, context=Context())


class Connection:
    """One client process's connection to one server process."""

    def __init__(self, network: Network, client: Process, weather: Weather) -> None:
        self.network = network
        self.client = client
        self.weather = weather
        self.server: Process | None = None
        self.broken = False
        """The client has given it up."""
        self.silent = False
        self._jammed = False
        self.up = False
        self.calls: dict[Call, None] = {}
        self.served: dict[Call, Served] = {}
        self._pipes = (Pipe(), Pipe())
        self._connect()

    @property
    def ends(self) -> tuple[Process | None, ...]:
        return self.client, self.server

    # Coming up.

    def _connect(self) -> None:
        network, now = self.network, self.network.loop.now
        if self.weather.unreachable_until > now:
            network.later(CONNECT_SECONDS, self._refused, "connecting took too long")
        else:
            network.later(3 * self._latency(), self._connected)

    def _connected(self) -> None:
        server = self.network.server
        if server is None or not server.alive:
            self._refused("connection refused")
            return
        self.server, self.up = server, True
        self.network.accepted[self] = None
        for direction in (0, 1):
            self._pump(direction)

    def _refused(self, why: str) -> None:
        self.broken = True
        self._tell_client(why)

    # Sending.

    def send(self, direction: int, size: int, deliver: Callable[[], None]) -> float:
        """Put a message into a pipe (0: to the server); return the seconds until the pipe has taken it.

        What a dead process sends, its unwinding included, is sent to nobody.
        """
        sender = CURRENT.get()
        if self.silent or (sender is not None and not sender.alive):
            return 0.0
        now, pipe = self.network.loop.now, self._pipes[direction]
        pipe.free_at = max(now, pipe.free_at) + size / self.weather.bytes_per_second
        pipe.waiting.append((pipe.free_at + self._latency(), deliver))
        self._pump(direction)
        return pipe.free_at - now

    def _pump(self, direction: int) -> None:
        pipe = self._pipes[direction]
        if self.up and pipe.waiting and pipe.next is None and not (self._jammed and direction == 0):
            now = self.network.loop.now
            at = max(now, pipe.waiting[0][0], self.weather.stalled_until)
            pipe.next = self.network.later(at - now, self._arrive, direction)

    def _arrive(self, direction: int) -> None:
        pipe = self._pipes[direction]
        pipe.next = None
        if self.silent or not pipe.waiting:
            return
        if self.weather.stalled_until <= self.network.loop.now:
            receiver = self.server if direction == 0 else self.client
            _, deliver = pipe.waiting.popleft()
            if receiver is not None and receiver.alive:
                deliver()
        self._pump(direction)

    def calm(self, weather: Weather) -> None:
        """Let better weather act on what waits already, as a sender's window opens again."""
        self.weather = weather
        for direction, pipe in enumerate(self._pipes):
            pipe.free_at = self.network.loop.now
            pipe.waiting = deque((min(due, pipe.free_at + self._latency()), deliver) for due, deliver in pipe.waiting)
            if pipe.next is not None:
                pipe.next.cancel()
                pipe.next = None
            self._pump(direction)

    def _latency(self) -> float:
        return self.weather.latency * self.network.chance.uniform(0.5, 2.0)

    # Breaking.

    def jam(self) -> None:
        """Hold what goes to the server for a while, then cut the connection."""
        self._jammed = True
        self.network.later(self.network.chance.expovariate(1.0), self.cut)

    def cut(self) -> None:
        """Reset the connection: what is on its way is lost or late, and each end is told after its own while."""
        if not self.silent:
            late = [deliver for _, deliver in self._pipes[0].waiting]
            self._silence()
            self.network.later(self._latency(), self._client_finds_out, "connection reset")
            seconds = self._latency()
            if self.network.chance.random() < 0.5:
                seconds += self.network.chance.expovariate(1 / 2)
                late = late[: self.network.chance.randint(0, len(late))]
                for deliver, share in zip(late, sorted(self.network.chance.random() for _ in late), strict=True):
                    self.network.later(seconds * share, self._arrive_late, deliver)
            self.network.later(seconds, self._server_finds_out)

    def _arrive_late(self, deliver: Callable[[], None]) -> None:
        if self.server is not None and self.server.alive and self in self.network.accepted:
            self.network.history.counts["a late message"] += 1
            deliver()

    def go_silent(self) -> None:
        """Lose everything from now on without a word; keepalives find out."""
        if not self.silent:
            self._silence()
            once = self.network.chance.uniform(0.3, 1.0)
            self.network.later(KEEPALIVE_SECONDS * once, self._client_finds_out, "keepalive timeout")
            once = self.network.chance.uniform(0.3, 1.0)
            self.network.later(KEEPALIVE_SECONDS * once, self._server_finds_out)

    def _silence(self) -> None:
        self.silent = True
        for pipe in self._pipes:
            pipe.waiting.clear()

    def _client_finds_out(self, why: str) -> None:
        self.broken = True
        self._tell_client(why)

    def _tell_client(self, why: str) -> None:
        for call in list(self.calls):
            call.lost(why)
        self.calls.clear()

    def _server_finds_out(self) -> None:
        self.network.accepted.pop(self, None)
        for served in list(self.served.values()):
            served.lost()
        self.served.clear()
