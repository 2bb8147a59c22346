"""A TCP proxy that breaks what it carries, on command and while it runs.

    with Proxy(("localhost", port)) as proxy:                 # clients connect to proxy.address
        proxy.inflict(Fault(latency=0.2))                     # every connection, those to come too
        proxy.connections[-1].inflict(Fault(reset_after=2**20))   # this one alone, 1 MiB from now
        proxy.heal()

It knows nothing of TLS or gRPC: to both ends it looks as a bad network does. Also a command, with faults switched by
lines on standard input: ``python tests/fault/proxy.py --to localhost:50051 --port 6000 latency=0.2``.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import socket
import struct
import sys
import threading
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, fields
from types import TracebackType
from typing import Any, Final, Literal, Self, TypeVar

PIECE: Final = 1 << 16
"""Bytes read at a time."""
CALL_SECONDS: Final = 10.0

Direction = Literal["up", "down"]
"""up: from the client to the server."""
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Fault:
    """What is wrong with a connection. Offsets are counted in each direction from the moment it is inflicted."""

    latency: float = 0.0
    """Seconds that every piece is late."""
    bytes_per_second: float = 0.0
    """The bandwidth of each direction; 0: unlimited."""
    reset_after: int = -1
    """Send RST to both ends after so many bytes."""
    truncate_after: int = -1
    """Close both ends in good order (FIN) after so many bytes; what follows is lost."""
    flip_at: int = -1
    """Change one bit of the byte at this offset."""
    black_hole: bool = False
    """Take everything and forward nothing, in both directions; a new connection is accepted and reaches nobody."""
    half_open: bool = False
    """The same in the fault's direction only: the other end lives, is heard, and hears nothing."""
    swallow_after: int = 0
    """The last two begin after so many bytes."""
    direction: Direction | None = None
    """In which direction it counts, flips or swallows; None: both."""

    @classmethod
    def parse(cls, text: str) -> Self:
        """Return the fault that words like ``latency=0.2 reset_after=1000 black_hole`` describe."""
        kinds: dict[str, Callable[[str], object]] = {"latency": float, "bytes_per_second": float, "direction": str}
        kinds |= dict.fromkeys(("reset_after", "truncate_after", "flip_at", "swallow_after"), int)
        values: dict[str, Any] = {}
        for word in text.split():
            name, _, value = word.partition("=")
            if name not in {field.name for field in fields(cls)}:
                raise ValueError(f"{name!r} is no fault; there are {', '.join(field.name for field in fields(cls))}")
            values[name] = kinds[name](value) if name in kinds else True
        return cls(**values)


HEALTHY: Final = Fault()


class Connection:
    """One client's connection. Only ``inflict`` may be called from other threads than the proxy's."""

    def __init__(self, proxy: Proxy, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._proxy = proxy
        self._fault = proxy.fault
        self._counted = {"up": 0, "down": 0}
        self._swallowing: set[str] = set()
        """Directions that have lost bytes: what follows would be out of place, so they stay silent for ever."""
        self._silent: set[str] = set()
        """Those among them whose sender has closed."""
        self._ends = [(reader, writer)]
        self.carried = {"up": 0, "down": 0}
        """Bytes forwarded."""
        self.alive = True
        self._struck = asyncio.Event()
        self._changed = asyncio.Event()

    def inflict(self, fault: Fault) -> None:
        """Put ``fault`` in the place of what was wrong before; offsets count from now."""
        self._proxy.call(self._inflict, fault)

    def _inflict(self, fault: Fault) -> None:
        self._fault = fault
        self._counted = {"up": 0, "down": 0}
        self._changed.set()
        self._changed = asyncio.Event()
        if fault.reset_after == 0 or fault.truncate_after == 0:
            self._struck.set()

    async def serve(self, target: tuple[str, int]) -> None:
        """Carry bytes until either end, or a fault, ends the connection."""
        if self._fault.black_hole and not self._fault.swallow_after:
            # Nobody is reached; the client may wait until it gives up.
            await self._drain_client()
            return
        try:
            self._ends.append(await asyncio.open_connection(*target))
        except OSError:
            self._end(reset=True)
            return
        (client, to_client), (server, to_server) = self._ends
        tasks = [
            asyncio.create_task(self._pump("up", client, to_server)),
            asyncio.create_task(self._pump("down", server, to_client)),
            asyncio.create_task(self._struck.wait()),
        ]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._end(reset=self._fault.reset_after >= 0 and self._struck.is_set())

    async def _drain_client(self) -> None:
        reader, _ = self._ends[0]
        with contextlib.suppress(OSError):
            while await reader.read(PIECE):
                pass
        self._end(reset=False)

    async def _pump(self, direction: Direction, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # A queue between reading and writing, so that latency delays pieces without thinning their stream.
        loop = asyncio.get_running_loop()
        late: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(maxsize=16)

        async def write() -> None:
            while True:
                due, piece = await late.get()
                if (left := due - loop.time()) > 0:
                    await asyncio.sleep(left)
                if not piece:
                    return
                await self._forward(direction, piece, writer)
                if self._struck.is_set():
                    return

        writing = asyncio.create_task(write())
        try:
            with contextlib.suppress(OSError):
                while not writing.done():
                    piece = await reader.read(PIECE)
                    await late.put((loop.time() + self._fault.latency, piece))
                    if not piece:
                        break
                await writing
            if direction in self._swallowing:
                # Nor does the other end hear that this one has gone; unless it has gone itself.
                self._silent.add(direction)
                if len(self._silent) < 2:
                    await asyncio.Event().wait()
        finally:
            writing.cancel()
            await asyncio.gather(writing, return_exceptions=True)

    async def _forward(self, direction: Direction, piece: bytes, writer: asyncio.StreamWriter) -> None:
        fault = self._fault
        if fault.direction in (None, direction):
            begin = self._counted[direction]
            self._counted[direction] += len(piece)
            if (fault.black_hole or fault.half_open) and self._counted[direction] > fault.swallow_after:
                self._swallowing |= {"up", "down"} if fault.black_hole else {direction}
            if 0 <= fault.flip_at - begin < len(piece):
                at = fault.flip_at - begin
                piece = piece[:at] + bytes((piece[at] ^ 0x10,)) + piece[at + 1 :]
            for limit in (fault.reset_after, fault.truncate_after):
                if 0 <= limit < begin + len(piece):
                    piece = piece[: max(0, limit - begin)]
                    self._struck.set()
        if direction in self._swallowing:
            return
        if fault.bytes_per_second:
            # Or until the fault is changed, so that a test need not wait for a slow piece.
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), len(piece) / fault.bytes_per_second)
        writer.write(piece)
        await writer.drain()
        self.carried[direction] += len(piece)

    def _end(self, *, reset: bool) -> None:
        self.alive = False
        for _, writer in self._ends:
            if reset:
                linger = struct.pack("ii", 1, 0)  # on, for no time: the kernel sends RST
                with contextlib.suppress(OSError):
                    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                writer.transport.abort()
            else:
                writer.close()


class Proxy:
    """Listens on a free port of the loopback, in a thread of its own, and forwards to ``target``."""

    def __init__(self, target: tuple[str, int], port: int = 0, fault: Fault = HEALTHY) -> None:
        self.target = target
        self.fault = fault
        self.connections: list[Connection] = []
        """Every one since the start, the ended ones too."""
        self.port = port
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        self._run(self._open())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._run(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    @property
    def address(self) -> str:
        """host:port for clients."""
        return f"localhost:{self.port}"

    @property
    def live(self) -> list[Connection]:
        """The connections that have not ended."""
        return [connection for connection in self.connections if connection.alive]

    def carried(self, direction: Direction) -> int:
        """Return the bytes forwarded in a direction by all connections so far."""
        return sum(connection.carried[direction] for connection in self.connections)

    def inflict(self, fault: Fault) -> None:
        """Inflict ``fault`` on every connection, and on those to come."""

        def everywhere() -> None:
            self.fault = fault
            for connection in self.live:
                connection._inflict(fault)

        self.call(everywhere)

    def inflict_live(self, fault: Fault) -> int:
        """Inflict ``fault`` on the connections of now only, and return how many there are."""

        def here() -> int:
            live = self.live
            for connection in live:
                connection._inflict(fault)
            return len(live)

        return self.call(here)

    def heal(self) -> None:
        """Inflict nothing any more. A direction that has lost bytes stays silent: only a new connection helps."""
        self.inflict(HEALTHY)

    def call(self, function: Callable[..., T], *arguments: object) -> T:
        """Call ``function`` in the proxy's thread and return what it returns."""

        async def work() -> T:
            return function(*arguments)

        return self._run(work())

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(CALL_SECONDS)

    async def _open(self) -> None:
        self._server = await asyncio.start_server(self._accepted, "127.0.0.1", self.port, limit=PIECE)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _close(self) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = Connection(self, reader, writer)
        self.connections.append(connection)
        task = self._loop.create_task(connection.serve(self.target))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def main() -> None:
    """Run a proxy until standard input ends; each line of it is the fault from now on, an empty one heals."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", required=True, metavar="HOST:PORT")
    parser.add_argument("--port", type=int, default=0, help="where to listen, on 127.0.0.1; 0: any free port")
    parser.add_argument("fault", nargs="*", help="; ".join(field.name for field in fields(Fault)))
    arguments = parser.parse_args()
    host, _, port = arguments.to.rpartition(":")
    with Proxy((host, int(port)), arguments.port, Fault.parse(" ".join(arguments.fault))) as proxy:
        sys.stderr.write(f"{proxy.address} -> {arguments.to}: {proxy.fault}\n")
        for line in sys.stdin:
            try:
                proxy.inflict(Fault.parse(line))
            except ValueError as error:
                sys.stderr.write(f"{error}\n")
            else:
                up, down = proxy.carried("up"), proxy.carried("down")
                sys.stderr.write(f"{proxy.fault}; {len(proxy.live)} live, {up} bytes up and {down} down so far\n")


if __name__ == "__main__":
    main()
