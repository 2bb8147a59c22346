"""One run's shell: it puts events through the core one by one, records each, and only then performs the effects."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from contextvars import Context
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from fsllm.v1 import control_pb2, federation_pb2
from fsllm_common.errors import FsllmError, Unavailable
from fsllm_common.failpoints import reach
from fsllm_common.files import disk_errors
from fsllm_common.telemetry.logs import bound, get_logger
from fsllm_server.engine import core, views
from fsllm_server.engine.effects import (
    ClearTimer,
    Effect,
    Notify,
    Reduce,
    SendOrder,
    SetTimer,
    SweepSpools,
    WithdrawOrder,
)
from fsllm_server.engine.events import DeadlinePassed, Event, MemberIdle, ReduceFailed, dump, load
from fsllm_server.engine.idle import IdleWatch
from fsllm_server.engine.manifests import committed
from fsllm_server.engine.meter import Meter
from fsllm_server.engine.reducing import reduce_updates
from fsllm_server.engine.replaying import replay
from fsllm_server.engine.state import Order, Run
from fsllm_server.engine.watchers import Notices, Watchers
from fsllm_server.reduce import Stopped
from fsllm_server.store.blobs import Blobs
from fsllm_server.store.events import Entry, EventLog, RunRecord
from fsllm_server.store.spools import Spools

log = get_logger()

_LOG: Final = Path("the log of events")
RECORD_AGAIN: Final = 5.0
"""Seconds until an event of the engine's own that could not be recorded (a full disk) is tried again."""


_ALARMING: Final = (("status", "paused"),)
"""Notices, by kind and subject, that an operator should see."""


@dataclass(frozen=True, slots=True)
class Outside:
    """What all runs of an engine share."""

    log: EventLog
    blobs: Blobs
    spools: Spools
    meter: Meter
    clock: Callable[[], float]
    deliver: Callable[[str, federation_pb2.AttachResponse], None]
    """Pushes to a member's session, if it is attached."""
    sweep: Callable[[str], Coroutine[Any, Any, int]]
    """Removes those of a run's uploads that are not to be kept."""
    make_room: Callable[[], Coroutine[Any, Any, bool]]
    """Removes what is kept without need, when the disk is full."""
    changed: Callable[[], None]
    """A run's status may have changed."""


class Runner:
    """A run that is under way, or has ended and can be looked at."""

    def __init__(self, record: RunRecord, log_: list[Entry], outside: Outside) -> None:
        """Replay the run's log."""
        self.plan = record.plan.encode()
        self._outside = outside
        self._sequence = len(log_)
        self._unsure = False
        """Whether the log may hold more than ``_sequence`` entries."""
        run: Run | None = None
        self._notices = 0
        recorded: list[str] = []
        for step in replay(record.id, log_):
            run = step.run
            self._notices += sum(isinstance(effect, Notify) for effect in step.effects)
            if step.commit is not None:
                recorded.append(step.recorded)
                if step.recorded not in ("", step.commit.manifest):
                    log.error(
                        "the log was changed after this commit; `fsllm run verify` says more",
                        run=record.id,
                        round=step.commit.round,
                    )
        if run is None:
            raise FsllmError("STATE_CORRUPT", f"run {record.id} has no event in its log")
        self.run: Run = run
        self.recorded = tuple(recorded)
        """The digest recorded for the manifest of each committed round; empty where there is none."""
        self._queue: asyncio.Queue[tuple[Event, asyncio.Future[None] | None] | None] = asyncio.Queue()
        self._task: asyncio.Task[None] | None = None
        self._work: set[asyncio.Task[object]] = set()
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._idle = IdleWatch(run.plan.timing.idle_seconds, self._member_idle)
        self._jobs: set[str] = set()
        self._stopped = asyncio.Event()
        self._watchers = Watchers()
        if run.status.ended:
            self._watchers.close()

    # The queue.

    def start(self) -> None:
        """Begin to take events, unless the run has ended."""
        if not self.run.status.ended:
            self._idle.follow(self.run.orders.values())
            # A context of its own: the submitter's names must not stand in every later line of the run's log.
            self._task = asyncio.create_task(self._take_events(), name=f"run {self.run.id}", context=Context())

    def post(self, event: Event) -> None:
        """Put an event in the queue; it will be recorded, however long that takes."""
        if self._task is not None and not self._stopped.is_set():
            self._queue.put_nowait((event, None))

    async def ask(self, event: Event) -> None:
        """Put an event in the queue and wait until it is recorded and decided upon.

        Raises:
            FsllmError: The core refuses it (see ``core.check``), it could not be recorded, RUN_ENDED, SERVER_STOPPING.

        """
        if self._stopped.is_set():
            raise stopping()
        if self._task is None:
            core.check(self.run, event)
            return
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queue.put_nowait((event, done))
        await done

    async def stop(self) -> None:
        """Decide nothing more. What is recorded is complete; a reduction under way is dropped."""
        self._stopped.set()
        self._queue.put_nowait(None)
        self._idle.stop()
        for timer in self._timers.values():
            timer.cancel()
        if self._task is not None:
            await self._task
        if self._work:
            await asyncio.wait(self._work)
        self._watchers.close(stopping())

    async def _take_events(self) -> None:
        with bound(run=self.run.id):
            while (item := await self._queue.get()) is not None:
                event, done = item
                if self._stopped.is_set():
                    _answer(done, stopping())
                    continue
                try:
                    await self._take(event, keep_trying=done is None)
                except FsllmError as error:
                    _answer(done, error)
                except Exception as error:
                    # A bug; the run's state is what the log says, and other events may still find their way.
                    log.exception("the engine failed on an event", kind=event.kind)
                    _answer(done, FsllmError("INTERNAL", f"run {self.run.id}: {type(error).__name__}"))
                else:
                    _answer(done, None)

    async def _take(self, event: Event, *, keep_trying: bool) -> None:
        body = dump(event)
        while True:
            try:
                if self._unsure and body in await self._catch_up():
                    return
                core.check(self.run, event)
                after, effects = core.decide(self.run, event)
                if after is self.run and not effects:
                    return  # it changes nothing
                commit = committed(self.run, after)
                manifest = commit.manifest if commit is not None else None
                entry = Entry(self._sequence + 1, event.at, event.kind, body, manifest)
                with self._whose_outcome_counts():
                    reach("event.append")
                    await self._outside.log.append(self.run.id, entry)
                reach("event.appended")
            except FsllmError as error:
                if not keep_trying or self._stopped.is_set():
                    raise
                log.warning("an event can not be recorded yet", kind=event.kind, reason=error.reason, why=error.message)
            else:
                self._become(entry, after, effects)
                return
            with suppress(TimeoutError):
                await asyncio.wait_for(self._stopped.wait(), RECORD_AGAIN)

    @contextmanager
    def _whose_outcome_counts(self) -> Iterator[None]:
        try:
            with disk_errors(_LOG):
                yield
        except FsllmError:
            self._unsure = True
            raise

    async def _catch_up(self) -> list[str]:
        """Take up what the log holds beyond what this side knows, and return it.

        A database may commit and be gone before it has said so.
        """
        found = (await self._outside.log.replay(self.run.id))[self._sequence :]
        for entry in found:
            self._become(entry, *core.decide(self.run, load(entry.body)))
        self._unsure = False
        return [entry.body for entry in found]

    def _become(self, entry: Entry, after: Run, effects: list[Effect]) -> None:
        """Take over what an entry of the log has made of the run."""
        self._sequence = entry.sequence
        if (commit := committed(self.run, after)) is not None:
            self.recorded = (*self.recorded, commit.manifest)
        self.run = after
        self._perform(entry.at, effects)

    # Effects.

    def _perform(self, at: float, effects: list[Effect]) -> None:
        for effect in effects:
            match effect:
                case SendOrder(order):
                    self._outside.deliver(order.member, views.order(self.run, order, self.plan))
                case WithdrawOrder():
                    self._outside.deliver(effect.member, views.withdrawal(effect))
                case SetTimer():
                    self._set_timer(effect)
                case ClearTimer():
                    if (timer := self._timers.pop(effect.timer, None)) is not None:
                        timer.cancel()
                case Reduce():
                    if effect.job not in self._jobs:
                        self._jobs.add(effect.job)
                        self._spawn(self._reduce(effect))
                case SweepSpools():
                    self._spawn(self._outside.sweep(self.run.id))
                case Notify():
                    self._notices += 1
                    self._watchers.tell(views.notice(self._notices, at, effect))
                    about = "site" if effect.subject in self.run.members else "subject"
                    alarming = effect.kind == "failure" or (effect.kind, effect.subject) in _ALARMING
                    tell = log.warning if alarming else log.info
                    tell(effect.message, kind=effect.kind, round=effect.round, **{about: effect.subject})
        self._idle.follow(self.run.orders.values())
        self._outside.meter.observe(self.run, effects)
        self._outside.changed()
        if self.run.status.ended:
            self._watchers.close()

    def _set_timer(self, effect: SetTimer) -> None:
        if (old := self._timers.pop(effect.timer, None)) is not None:
            old.cancel()

        def passed() -> None:
            self._timers.pop(effect.timer, None)
            self.post(DeadlinePassed(at=self._outside.clock(), timer=effect.timer))

        self._timers[effect.timer] = asyncio.get_running_loop().call_later(effect.seconds, passed)

    def _member_idle(self, order: Order) -> None:
        self.post(MemberIdle(at=self._outside.clock(), member=order.member, order_id=order.id))

    async def _reduce(self, effect: Reduce) -> None:
        outside = self._outside

        async def attempt() -> Event:
            return await asyncio.to_thread(
                reduce_updates, self.run, effect, outside.blobs, outside.spools, outside.clock, self._stopped.is_set
            )

        try:
            try:
                event = await attempt()
            except FsllmError as error:
                if error.reason != "DISK_FULL" or not await outside.make_room():
                    raise
                event = await attempt()
        except Stopped:
            return
        except FsllmError as error:
            event = ReduceFailed(at=outside.clock(), job=effect.job, reason=error.reason, message=error.message)
        except Exception as error:
            log.exception("the reduction failed")
            message = f"the reduction failed: {type(error).__name__}; see the server's log"
            event = ReduceFailed(at=outside.clock(), job=effect.job, reason="INTERNAL", message=message)
        self._jobs.discard(effect.job)
        self.post(event)

    def _spawn(self, work: Coroutine[Any, Any, object]) -> None:
        task = asyncio.create_task(work)
        self._work.add(task)
        task.add_done_callback(self._work.discard)

    # Watching.

    def touch(self, member: str) -> None:
        """Bytes of one of the member's orders have advanced."""
        self._idle.touch(member)

    def progress(self, member: str, progress: federation_pb2.Progress) -> None:
        """Take a report of an open order of the member's."""
        order = self.run.orders.get(progress.order_id)
        if order is None or order.member != member:
            return
        self._idle.progress(progress)
        self._outside.meter.reported(self.run, member, views.metrics_of(progress.metrics))
        self._watchers.tell(views.progress_notice(self._outside.clock(), order.round, member, progress))

    def watch(self, after: int) -> AsyncIterator[control_pb2.WatchRunResponse]:
        """Return the stream of notices after ``after``."""
        return self._watchers.stream(after, self._recorded)

    async def _recorded(self) -> Notices:
        """Replay the log for what was told."""
        entries = await self._outside.log.replay(self.run.id)
        told: list[control_pb2.WatchRunResponse] = []
        for step in replay(self.run.id, entries):
            for effect in step.effects:
                if isinstance(effect, Notify):
                    told.append(views.notice(len(told) + 1, step.entry.at, effect))
        return told


def _answer(done: asyncio.Future[None] | None, error: FsllmError | None) -> None:
    if done is None or done.done():
        return
    if error is None:
        done.set_result(None)
    else:
        done.set_exception(error)


def stopping() -> Unavailable:
    """Return what is raised to whoever asks for something while the server stops."""
    return Unavailable("SERVER_STOPPING", "The server stops", retry_after=1.0)
