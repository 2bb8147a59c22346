"""The daemon's side of the trainer: starts the worker's process group, gives it orders, and outlives it.

No torch here, and no fork without exec: the group is exec'ed in a session of its own, and speaks over a Unix socket in
a folder that only this user can enter. When a rank dies, runs out of memory or is killed, ``run`` raises
``TrainingFailed``; the next ``run`` starts a new group and prepares it again.
"""

import asyncio
import contextlib
import logging
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Coroutine, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

from fsllm_client.trainer.deaths import cause, error_of, kernel_kills
from fsllm_client.trainer.launch import command, environment, gpus, processor_seconds
from fsllm_client.trainer.orders import (
    Account,
    Advanced,
    Build,
    Cancel,
    Evaluate,
    Finished,
    GaveUp,
    Here,
    Message,
    Prepare,
    Stop,
    Train,
    report_lines,
)
from fsllm_common.errors import FsllmError, TrainingFailed

_log = logging.getLogger(__name__)

Work = Prepare | Build | Train | Evaluate | Account

_LONGEST_SOCKET_PATH: Final = 100  # the kernel's limit is 107 bytes
_LINE_LIMIT: Final = 1 << 20
_LARGEST_LOG: Final = 8 << 20
_LOG_TAIL: Final = 16 << 10


@dataclass(slots=True)
class _Rank:
    here: Here
    writer: asyncio.StreamWriter
    process: int
    """A pidfd, which a reused pid can not deceive."""


class Trainer:
    """The trainer worker of one daemon. Orders are carried out one at a time.

    Args:
        state: The site's state folder; the socket and the log lie under ``trainer/``.
        ranks: Processes that train together: one a GPU, or one.
        threads: OpenMP threads a rank; an even share of the cores when None.
        extensions: Where DeepSpeed's compiled operators are; under ``state`` when None.
        given: Environment variables to set for the worker, over everything.
        start_seconds: For how long the ranks may do nothing before they report.

    """

    def __init__(
        self,
        state: Path,
        *,
        ranks: int = 1,
        threads: int | None = None,
        extensions: Path | None = None,
        given: Mapping[str, str] | None = None,
        start_seconds: float = 120,
    ) -> None:
        self._folder = state / "trainer"
        self._ranks = ranks
        self._threads = threads
        self._extensions = extensions or self._folder / "extensions"
        self._given = given
        self._start_seconds = start_seconds
        self._turn = asyncio.Lock()
        self._process: asyncio.subprocess.Process | None = None
        self._server: asyncio.Server | None = None
        self._socket_folder: Path | None = None
        self._connected: dict[int, _Rank] = {}
        self._inbox: asyncio.Queue[tuple[int, Here | Advanced | Finished | GaveUp | None]] = asyncio.Queue()
        self._lost = False
        self._unwanted = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._prepared: tuple[Prepare, Finished] | None = None
        self.prepares = 0
        """How often a model was loaded and data tokenised; not between the rounds of one run."""
        self._wanted: Prepare | None = None
        self._log_start = 0
        self._kills_before: int | None = None

    @property
    def alive(self) -> bool:
        """Whether the worker runs. When it does not, ``run`` starts it."""
        process = self._process
        return (
            process is not None
            and process.returncode is None
            and len(self._connected) == self._ranks
            and not self._lost
        )

    @property
    def log(self) -> Path:
        """Where the worker's output goes."""
        return self._folder / "trainer.log"

    async def start(self) -> None:
        """Start the worker's group, unless it runs, and wait until every rank has reported.

        Raises:
            TrainingFailed: WORKER_DIED, or OUT_OF_MEMORY.

        """
        if self.alive:
            return
        await self._end_group(polite=False)
        self._inbox, self._lost = asyncio.Queue(), False
        path = self._socket_path()
        self._server = await asyncio.start_unix_server(self._serve, path, limit=_LINE_LIMIT)
        path.chmod(0o600)
        self._kills_before = kernel_kills()
        with self._open_log() as log:
            self._process = await asyncio.create_subprocess_exec(
                *command(path, self._ranks),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self._folder,
                env=environment(
                    extensions=self._extensions,
                    ranks=self._ranks,
                    threads=self._threads,
                    gpu=gpus() > 0,
                    given=self._given,
                ),
                start_new_session=True,
            )
        self._watch(self._report_exit(self._process, self._inbox))
        done = processor_seconds(self._process.pid, self._ranks)
        while len(self._connected) < self._ranks:
            try:
                async with asyncio.timeout(self._start_seconds):
                    if (await self._inbox.get())[1] is None:
                        raise await self._death("while it started")
            except TimeoutError as error:
                # A slow disk or a busy host is no reason to give up what gets on.
                if (now := processor_seconds(self._process.pid, self._ranks)) != done:
                    done = now
                    continue
                await self._end_group(polite=False)
                raise TrainingFailed(
                    "WORKER_DIED",
                    f"the trainer did not report, and did nothing for {self._start_seconds:.0f} s; see {self.log}",
                ) from error

    async def run(self, order: Work, on_progress: Callable[[Advanced], None] | None = None) -> Finished:
        """Carry out an order, starting the worker first, and preparing it again, when it has died since.

        Preparing for what is prepared already returns at once; for another run, a worker with GPUs is replaced by a new
        one, and one without changes over.
        When the awaiting task is cancelled, so is the order, and the worker stays.

        Raises:
            TrainingFailed: WORKER_DIED or OUT_OF_MEMORY, then the worker is gone; LOSS_NOT_FINITE, then it goes on.
            FsllmError: Whatever the worker gave as the reason for giving up; ORDER_UNKNOWN after ``cancel``.

        """
        async with self._turn:
            self._unwanted = False
            if isinstance(order, Prepare):
                self._wanted = order
            if not isinstance(order, Account):
                prepared = await self._prepare(on_progress)
                if isinstance(order, Prepare):
                    return prepared
            await self.start()
            if self._unwanted:  # while it was prepared anew
                raise FsllmError("ORDER_UNKNOWN", f"the order was given up before it began: {order.kind}")
            return await self._carry_out(order, on_progress)

    def cancel(self) -> None:
        """Have the order in hand given up at its next step; ``run`` then raises ORDER_UNKNOWN."""
        self._unwanted = True
        self._send(Cancel())

    async def stop(self, grace: float = 5.0) -> None:
        """End the worker: ask, then SIGTERM, then SIGKILL, each after ``grace`` seconds. No rank survives this."""
        await self._end_group(polite=True, grace=grace)
        self._prepared = None

    # Orders.

    async def _prepare(self, on_progress: Callable[[Advanced], None] | None) -> Finished:
        if self._wanted is None:
            raise TrainingFailed("INTERNAL", "the trainer was given an order before it was prepared")
        if self._prepared is not None and self._prepared[0] == self._wanted and self.alive:
            return self._prepared[1]
        if self._prepared is not None and gpus() > 0:
            # A GPU's memory comes back whole only from a dead process. On the CPU the worker changes runs by itself,
            # which saves the many seconds that importing the training stack takes.
            await self.stop()
        await self.start()
        self.prepares += 1
        finished = await self._carry_out(self._wanted, on_progress)
        self._prepared = (self._wanted, finished)
        return finished

    async def _carry_out(self, order: Work, on_progress: Callable[[Advanced], None] | None) -> Finished:
        self._send(order)
        try:
            answers = await self._answers(order, on_progress)
        except asyncio.CancelledError:
            self._send(Cancel())
            # The ranks answer at their next step. Until then nothing else may be asked of them.
            await asyncio.shield(self._settle(order))
            raise
        return await self._result(order, answers)

    async def _answers(
        self, order: Work, on_progress: Callable[[Advanced], None] | None
    ) -> dict[int, Finished | GaveUp]:
        """Wait until every rank has ended the order. A rank that gives up alone leaves the others waiting for it."""
        answers: dict[int, Finished | GaveUp] = {}
        while len(answers) < self._ranks:
            patience = _PATIENCE if any(isinstance(a, GaveUp) for a in answers.values()) else None
            try:
                async with asyncio.timeout(patience):
                    rank, report = await self._inbox.get()
            except TimeoutError:
                break
            match report:
                case None:
                    if any(isinstance(answer, GaveUp) for answer in answers.values()):
                        break
                    raise await self._death(f"during: {order.kind}")
                case Advanced():
                    if on_progress is not None:
                        on_progress(report)
                case Finished() | GaveUp():
                    answers[rank] = report
                case Here():
                    pass
        return answers

    async def _result(self, order: Work, answers: Mapping[int, Finished | GaveUp]) -> Finished:
        gave_up = [answer for _, answer in sorted(answers.items()) if isinstance(answer, GaveUp)]
        finished = answers.get(0)
        if not gave_up and isinstance(finished, Finished):
            return finished
        if not gave_up:
            raise await self._death(f"during: {order.kind}")
        in_step = len(gave_up) == self._ranks
        if not in_step or gave_up[0].reason == "OUT_OF_MEMORY" or isinstance(order, Prepare):
            # What half an order has left in a rank is of no use to the next.
            await self._end_group(polite=False)
        raise error_of(gave_up[0], self.log)

    async def _settle(self, order: Work) -> None:
        try:
            async with asyncio.timeout(_SETTLE):
                await self._answers(order, None)
        except (TimeoutError, TrainingFailed):
            await self._end_group(polite=False)

    def _send(self, message: Message) -> None:
        line = message.model_dump_json().encode() + b"\n"
        for rank in self._connected.values():
            rank.writer.write(line)

    # The group.

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Read one rank's reports until its end."""
        inbox, number = self._inbox, -1
        try:
            async for line in reader:
                report = report_lines.validate_json(line)
                if isinstance(report, Here):
                    number = report.rank
                    self._connected[number] = _Rank(report, writer, os.pidfd_open(report.pid))
                inbox.put_nowait((number, report))
        except (OSError, ValueError) as error:
            _log.warning("trainer rank %d: %s", number, error)
        finally:
            writer.close()
            inbox.put_nowait((number, None))
            if inbox is self._inbox:
                self._lost = True

    async def _report_exit(
        self,
        process: asyncio.subprocess.Process,
        inbox: asyncio.Queue[tuple[int, Here | Advanced | Finished | GaveUp | None]],
    ) -> None:
        await process.wait()
        inbox.put_nowait((-1, None))

    def _watch(self, coroutine: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _death(self, when: str) -> TrainingFailed:
        """Clear the dead group away and say what it died of."""
        code = await self._end_group(polite=False, grace=_DYING)
        out_of_memory, how = cause(code, self._kills_before, self._log_since_start())
        if out_of_memory:
            return TrainingFailed("OUT_OF_MEMORY", f"the trainer ran out of memory {when} ({how}); see {self.log}")
        return TrainingFailed("WORKER_DIED", f"the trainer {how} {when}; see {self.log}")

    async def _end_group(self, *, polite: bool, grace: float = 0.0) -> int | None:
        """End every process of the group, and return the exit code that it had by itself, if it had one."""
        process, ranks = self._process, list(self._connected.values())
        code: int | None = None
        if process is not None:
            if polite:
                self._send(Stop())
            # Its own end first, then ours: 0 s of grace still sees an exit that has happened.
            if not await _ended(process, grace):
                with contextlib.suppress(ProcessLookupError):
                    process.terminate()
                if not await _ended(process, max(grace, _TERM) if polite else _TERM):
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(process.pid, signal.SIGKILL)
                    await process.wait()
            else:
                code = process.returncode
        for rank in ranks:
            # Under torchrun a rank is in a process group of its own, which killpg misses.
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(rank.process, signal.SIGKILL)
            os.close(rank.process)
        self._connected = {}
        if self._server is not None:
            self._server.close()
        for rank in ranks:
            rank.writer.close()
        self._process = self._server = None
        if self._socket_folder is not None:
            shutil.rmtree(self._socket_folder, ignore_errors=True)
            self._socket_folder = None
        return code

    # Files.

    def _socket_path(self) -> Path:
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._folder.chmod(0o700)
        path = self._folder / "socket"
        if len(os.fsencode(path)) <= _LONGEST_SOCKET_PATH:
            path.unlink(missing_ok=True)
            return path
        self._socket_folder = Path(tempfile.mkdtemp(prefix="fsllm-"))  # 0700
        return self._socket_folder / "socket"

    @contextlib.contextmanager
    def _open_log(self) -> Iterator[BinaryIO]:
        if self.log.exists() and self.log.stat().st_size > _LARGEST_LOG:
            self.log.replace(self.log.with_suffix(".log.1"))
        with self.log.open("ab") as log:
            self._log_start = log.tell()
            yield log

    def _log_since_start(self) -> str:
        try:
            with self.log.open("rb") as log:
                log.seek(max(self._log_start, self.log.stat().st_size - _LOG_TAIL))
                return log.read().decode(errors="replace")
        except OSError:
            return ""


_PATIENCE: Final = 10.0  # seconds for the other ranks to end an order that one has given up
_SETTLE: Final = 60.0  # seconds for a cancelled order to come to its next step
_DYING: Final = 3.0  # seconds from a closed socket to the end of the process behind it
_TERM: Final = 5.0  # seconds from SIGTERM to SIGKILL


async def _ended(process: asyncio.subprocess.Process, seconds: float) -> bool:
    try:
        async with asyncio.timeout(max(seconds, 0.01)):
            await process.wait()
    except TimeoutError:
        return False
    return True
