"""Running a study: trials are submitted as runs, watched through their streams, pruned, and recorded as they end."""

import math
import queue
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Protocol, TypeVar

from fsllm.v1.control_pb2 import (
    RUN_STATUS_CANCELLED,
    RUN_STATUS_PAUSED,
    RUN_STATUS_RUNNING,
    CancelRunRequest,
    GetServerRequest,
    Run,
    SubmitRunRequest,
    WatchRunResponse,
)
from fsllm_common.errors import FsllmError, Unavailable
from fsllm_common.plan import canonical_json
from fsllm_operator.connection import ENDED, Connection, wait
from fsllm_operator.rounds import Round
from fsllm_operator.tune.search import FAILED, RUNNING, Search, Trial
from fsllm_operator.watching import Watched

T = TypeVar("T")


class Audience(Protocol):
    """Who is told what happens."""

    def began(self, trial: Trial, watched: Watched) -> None:
        """A trial's run is under way: begun now, or found where an earlier command left it."""

    def happened(self, trial: int, event: WatchRunResponse) -> None:
        """Something happened in a trial's run, which its ``Watched`` knows already."""

    def measured(self, trial: Trial, round_: int) -> None:
        """A round's objective is recorded."""

    def ended(self, trial: Trial) -> None:
        """A trial is done, pruned or failed."""

    def lost(self, error: FsllmError) -> None:
        """The server can not be reached, and is waited for."""


@dataclass(frozen=True, slots=True)
class _Ended:
    """A run's stream is over: the run has ended, or it could not be watched."""

    error: FsllmError | None = None


@dataclass(frozen=True, slots=True)
class _Lost:
    error: FsllmError


class _Interrupted:
    """Ctrl-C, for when gRPC's compiled parts have swallowed the exception."""


_News = WatchRunResponse | _Ended | _Lost | _Interrupted


class Optimiser:
    """Drives one study to its number of trials. Optuna and its file are used from the calling thread alone."""

    def __init__(self, connection: Connection, search: Search, audience: Audience) -> None:
        self._connection = connection
        self._search = search
        self._audience = audience
        self._news: queue.SimpleQueue[tuple[int, _News]] = queue.SimpleQueue()
        self._active: dict[int, Watched] = {}
        self._failures = 0

    def run(self) -> None:
        """Take up the trials that are under way, and begin others, until all have ended.

        Raises:
            FsllmError: The server can not be reached at the start, refuses this operator, or too many trials in a row
                have failed.
            KeyboardInterrupt: Ctrl-C; runs under way go on at the server.

        """
        study = self._search.space.study
        self._connection.call(self._connection.control.GetServer, GetServerRequest())
        with self._interruptible():
            for trial in self._search.trials():
                if trial.state == RUNNING:
                    self._begin(trial)
            while True:
                while len(self._active) < study.parallel and len(self._search.trials()) < study.trials:
                    self._begin(self._search.draw())
                if not self._active:
                    return
                number, news = self._news.get()
                self._take(number, news)

    # One trial.

    def _begin(self, trial: Trial) -> None:
        """Submit a trial's run or find it, and watch it."""
        number = trial.number
        try:
            if not trial.values:
                trial = self._search.draw(number)
            if not trial.plan:
                name = f"{self._search.space.study.name}-{number}"
                plan = canonical_json(self._search.space.plan_with(name, trial.values))
                self._search.note(number, plan=plan.decode())
                trial = self._search.trial(number)
            run = self._run_of(trial)
        except FsllmError as error:
            # The values' fault; any other is no trial's.
            if error.reason != "PLAN_INVALID":
                raise
            self._fail(number, error.message)
            return
        self._search.note(number, run_id=run.run_id)
        self._active[number] = watched = Watched.of(run)
        self._audience.began(self._search.trial(number), watched)
        if trial.ends:
            self._prune(number)
        # What was committed while nobody watched is judged as if somebody had.
        for round_ in sorted(watched.committed):
            if number in self._active:
                self._measure(number, watched.committed[round_], running=run.status not in ENDED)
        if number in self._active:
            threading.Thread(target=self._watch, args=(number, run.run_id), daemon=True).start()

    def _run_of(self, trial: Trial) -> Run:
        """Return the trial's run; submit it when the server has none."""
        if trial.run_id:
            known = trial.run_id
            try:
                return self._patiently(lambda: self._connection.run(known))
            except FsllmError as error:
                if error.reason != "RUN_UNKNOWN":
                    raise
            # A server that was set up anew, or another one.
            self._search.note(trial.number, attempt=trial.attempt + 1, run_id="")
            trial = self._search.trial(trial.number)
        request = SubmitRunRequest(plan=trial.plan, request_id=self._search.request_id(trial))
        submit = self._connection.control.SubmitRun
        submitted = self._patiently(lambda: self._connection.call(submit, request, repeat=True).run)
        return self._patiently(lambda: self._connection.run(submitted.run_id))

    def _watch(self, number: int, run_id: str) -> None:
        """Put a run's events among the news, in a thread of its own."""
        try:
            for event in self._connection.watch(run_id, lost=lambda error: self._news.put((number, _Lost(error)))):
                self._news.put((number, event))
            self._news.put((number, _Ended()))
        except FsllmError as error:
            self._news.put((number, _Ended(error)))
        except ValueError:
            return  # the channel was closed: the command ends

    def _take(self, number: int, news: _News) -> None:
        if isinstance(news, _Interrupted):
            raise KeyboardInterrupt
        if isinstance(news, _Lost):
            self._audience.lost(news.error)
            return
        watched = self._active.get(number)
        if watched is None:
            return  # the last words of a run that was cancelled
        if isinstance(news, _Ended):
            if news.error is not None and news.error.reason != "RUN_UNKNOWN":
                raise news.error
            self._end(number, watched)
            return
        if not watched.apply(news):
            return
        self._audience.happened(number, news)
        if news.HasField("commit"):
            self._measure(number, watched.committed[news.commit.round], running=True)
        elif news.kind == "status" and news.subject == "paused":
            # What the log says of the past is no news: ask whether it is paused now.
            run = self._patiently(lambda: self._connection.run(watched.run_id))
            if run.status == RUN_STATUS_PAUSED:
                self._fail(number, f"paused: {run.message}" if run.message else "paused")

    def _measure(self, number: int, committed: Round, *, running: bool) -> None:
        """Record a round's objective, and prune the trial if its run has rounds left that are not worth while."""
        objective = committed.metrics.get(self._search.space.study.objective.key)
        if committed.number == 0 or objective is None or committed.number in self._search.trial(number).curve:
            return  # version 0 is the same in all trials
        better_ended = self._search.report(number, committed.number, objective)
        self._audience.measured(self._search.trial(number), committed.number)
        if better_ended and running and committed.number < self._active[number].rounds:
            self._search.condemn(number)
            self._prune(number)

    def _prune(self, number: int) -> None:
        run_id = self._active.pop(number).run_id
        request = CancelRunRequest(run_id=run_id)
        try:
            self._patiently(lambda: self._connection.call(self._connection.control.CancelRun, request))
        except FsllmError as error:
            if error.reason not in ("RUN_ENDED", "RUN_UNKNOWN"):
                raise
        self._failures = 0
        self._audience.ended(self._search.prune(number))

    def _end(self, number: int, watched: Watched) -> None:
        """Record what became of a run that has ended."""
        try:
            run = self._patiently(lambda: self._connection.run(watched.run_id))
        except FsllmError as error:
            if error.reason != "RUN_UNKNOWN":
                raise
            self._fail(number, error.message)
            return
        watched.refresh(run)
        for round_ in sorted(watched.committed):
            self._measure(number, watched.committed[round_], running=False)
        trial = self._search.trial(number)
        if run.status == RUN_STATUS_CANCELLED:
            self._fail(number, f"cancelled: {run.message}" if run.message else "cancelled")
        elif run.status == RUN_STATUS_RUNNING:
            self._fail(number, "its stream ended before the run did")
        elif trial.rounds < run.rounds or trial.objective is None:
            objective = self._search.space.study.objective
            self._fail(number, f"no {objective.metric} of the {objective.whose} after the last round")
        elif not math.isfinite(trial.objective):
            self._fail(number, f"{self._search.space.study.objective.metric} is {trial.objective}")
        else:
            del self._active[number]
            self._failures = 0
            self._audience.ended(self._search.finish(number))

    def _fail(self, number: int, message: str) -> None:
        """Record a failure; too many in a row are the federation's, not the values'."""
        self._active.pop(number, None)
        trial = self._search.fail(number, message)
        self._audience.ended(trial)
        self._failures += 1
        study, file = self._search.space.study, self._search.space.file
        if self._failures >= study.failed_trials:
            where = f" (run {trial.run_id})" if trial.run_id else ""
            raise FsllmError(
                "RUN_FAILED",
                f"{self._failures} trials in a row have {FAILED}; the last{where}: {message}",
                cure=f"`fsllm run show {trial.run_id or 'RUN'}` says more. Mend the cause; then `fsllm tune {file}` "
                f"goes on with the next trial.",
            )

    # The server.

    def _patiently(self, call: Callable[[], T]) -> T:
        """Make a call, again and again while the server can not be reached."""
        while True:
            try:
                return call()
            except Unavailable as error:
                self._audience.lost(error)
                wait(error)

    @contextmanager
    def _interruptible(self) -> Iterator[None]:
        """See to it that Ctrl-C ends ``run``."""

        def interrupt(number: int, frame: FrameType | None) -> None:
            self._news.put((-1, _Interrupted()))
            signal.default_int_handler(number, frame)

        previous = signal.signal(signal.SIGINT, interrupt)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, previous)
