"""An event loop whose time is virtual, and virtual processes that can be killed between any two of their steps.

A process is a context variable: whatever a process schedules carries it, and nothing of a dead process is ever run
again. Its coroutines stay where they stood, for ever, as those of a killed process do: no ``finally`` is run.
"""

# ruff: noqa: ANN401 - asyncio calls back whatever it was given.

import asyncio
import heapq
import itertools
import random
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor
from contextvars import Context, ContextVar, copy_context
from pathlib import Path
from typing import Any, Final, TypeVar

T = TypeVar("T")

THREAD_SECONDS: Final = (0.0002, 0.02)
"""How long a thread takes to begin, and again to report back."""


class Killed(BaseException):
    """Unwinds the step in which a process dies; nothing that the unwinding does is seen by anybody."""


class Stuck(Exception):
    """Nothing will ever happen any more."""


class Process:
    """One incarnation of a virtual process, from its start to its death."""

    def __init__(self, name: str, number: int, folder: Path) -> None:
        self.name = name
        self.number = number
        self.folder = folder
        self.alive = True
        self.frozen_until = 0.0
        """Stopped (SIGSTOP) until then."""
        self.full_until = 0.0
        """Its disk is full until then."""
        self.context = copy_context()
        self.context.run(CURRENT.set, self)

    def __repr__(self) -> str:
        return f"{self.name}#{self.number}"


CURRENT: ContextVar[Process | None] = ContextVar("process", default=None)


class Task(asyncio.Task[T]):
    """A task whose place in a set does not depend on its address."""

    number = 0
    process: Process | None = None

    def __hash__(self) -> int:
        return self.number


class Loop(asyncio.BaseEventLoop):
    """Runs everything in one thread, in an order that the seed decides; waiting takes no time at all."""

    def __init__(self, chance: random.Random) -> None:
        super().__init__()
        self.now = 0.0
        self.chance = chance
        self.tasks: list[Task[Any]] = []
        """Every task ever made: none may be collected before the end, when its ``finally`` can do no harm."""
        self._timers: list[tuple[float, int, asyncio.TimerHandle]] = []
        self._sequence = itertools.count()
        self.set_task_factory(self._make_task)

    def time(self) -> float:
        return self.now

    def _make_task(self, loop: asyncio.AbstractEventLoop, coroutine: Coroutine[Any, Any, T], **options: Any) -> Task[T]:
        task = Task(coroutine, loop=loop, **options)
        context = options.get("context")
        task.process = context.get(CURRENT) if context is not None else CURRENT.get()
        task.number = len(self.tasks)
        self.tasks.append(task)
        return task

    def call_at(
        self, when: float, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> asyncio.TimerHandle:
        handle = asyncio.TimerHandle(when, callback, args, self, context)
        heapq.heappush(self._timers, (when, next(self._sequence), handle))
        return handle

    def call_later(
        self, delay: float, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> asyncio.TimerHandle:
        return self.call_at(self.now + delay, callback, *args, context=context)

    def call_soon_threadsafe(
        self, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> asyncio.Handle:
        return self.call_soon(callback, *args, context=context)

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        """Cancelled timers are passed over when their time comes."""

    def _run_once(self) -> None:
        ready: Any = self._ready  # type: ignore[attr-defined] # of BaseEventLoop
        if not ready:
            while self._timers and self._timers[0][2].cancelled():
                heapq.heappop(self._timers)
            if not self._timers:
                raise Stuck
            self.now = max(self.now, self._timers[0][0])
        while self._timers and self._timers[0][0] <= self.now:
            handle = heapq.heappop(self._timers)[2]
            if not handle.cancelled():
                ready.append(handle)
        for _ in range(len(ready)):
            self._run_handle(ready.popleft())

    def _run_handle(self, handle: asyncio.Handle) -> None:
        if handle.cancelled():
            return
        process = handle._context.get(CURRENT)  # type: ignore[attr-defined] # the context it was scheduled in
        if process is not None:
            if not process.alive:
                return
            if process.frozen_until > self.now:
                frozen = (process.frozen_until, next(self._sequence), handle)
                heapq.heappush(self._timers, frozen)  # type: ignore[arg-type] # any handle will do
                return
        handle._run()

    def pause(self) -> float:
        """Return the length of a thread's delay."""
        return self.chance.uniform(*THREAD_SECONDS)

    def run_in_executor(  # type: ignore[override] # a future either way
        self, executor: Executor | None, func: Callable[..., T], *args: Any
    ) -> asyncio.Future[T]:
        """Do the work at once, a little later, and tell of it a little later still: a process may die in between."""
        future: asyncio.Future[T] = self.create_future()

        def work() -> None:
            try:
                result = func(*args)
            except Killed:
                return
            except Exception as error:  # noqa: BLE001 - it is the future's
                self.call_later(self.pause(), _settle, future, None, error)
            else:
                self.call_later(self.pause(), _settle, future, result, None)

        self.call_later(self.pause(), work)
        return future

    def add_signal_handler(self, sig: int, callback: Callable[..., object], *args: Any) -> None:
        """Nobody sends signals here."""

    def remove_signal_handler(self, sig: int) -> bool:
        return False

    def _write_to_self(self) -> None:
        """There is no selector to wake."""

    def _process_events(self, event_list: object) -> None:
        """There is no selector."""


def _settle(future: "asyncio.Future[Any]", result: object, error: Exception | None) -> None:
    if future.done():
        return
    if error is not None:
        future.set_exception(error)
    else:
        future.set_result(result)
