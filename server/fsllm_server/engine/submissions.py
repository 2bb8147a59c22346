"""New runs: each request makes one, however often it comes and whatever becomes of its caller meanwhile."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable

from fsllm_common.errors import PlanInvalid
from fsllm_common.plan import Plan, canonical_json
from fsllm_server.engine.core import decide
from fsllm_server.engine.events import Submitted, dump
from fsllm_server.engine.reducing import installed_algorithm
from fsllm_server.engine.rules import LATEST
from fsllm_server.store.events import Entry, EventLog, RunRecord


class Submissions:
    """Records runs, one at a time."""

    def __init__(self, log: EventLog, clock: Callable[[], float], begin: Callable[[RunRecord, Entry], None]) -> None:
        """Args: begin: Called with a run and its first event when they are recorded."""
        self._log = log
        self._clock = clock
        self._begin = begin
        self._known: dict[str, RunRecord] = {}
        """By request_id."""
        self._one_at_a_time = asyncio.Lock()
        self._unfinished: set[asyncio.Task[str]] = set()

    def note(self, record: RunRecord) -> None:
        """Remember a run that is recorded."""
        self._known[record.request_id] = record

    async def submit(self, plan: Plan, request_id: str) -> str:
        """Record a run, begin it, and return its id. The same request again returns the same run.

        Raises:
            PlanInvalid: The algorithm is not installed here, or the request_id was another plan's.
            FsllmError: DISK_FULL, STATE_CORRUPT.

        """
        # A caller that leaves half-way must not leave a run that is recorded and that nobody knows: its next try would
        # be another run.
        task = asyncio.create_task(self._submit(plan, request_id))
        self._unfinished.add(task)
        task.add_done_callback(self._finished)
        return await asyncio.shield(task)

    async def stop(self) -> None:
        """Return when nothing is being recorded any more."""
        await asyncio.gather(*self._unfinished, return_exceptions=True)

    async def _submit(self, plan: Plan, request_id: str) -> str:
        text = canonical_json(plan).decode()
        algorithm = installed_algorithm(plan.algorithm.name)
        async with self._one_at_a_time:
            if (known := self._known.get(request_id)) is not None:
                if known.plan != text:
                    message = f"request_id {request_id!r} has submitted another plan as run {known.id}"
                    raise PlanInvalid(message, cure="Use a fresh random request_id for each submission.")
                return known.id
            now = self._clock()
            record = RunRecord(secrets.token_hex(6), plan.name, request_id, text, now)
            event = Submitted(
                at=now,
                run_id=record.id,
                plan=text,
                needs_trainer=algorithm.needs_trainer,
                needs_trusted=algorithm.needs_trusted,
                in_pairs=algorithm.in_pairs,
                rules=LATEST,
            )
            decide(None, event)  # what could not be read back must not be recorded
            first = Entry(1, now, event.kind, dump(event))
            await self._log.submit(record, first)
            self._begin(record, first)
            return record.id

    def _finished(self, task: asyncio.Task[str]) -> None:
        self._unfinished.discard(task)
        if not task.cancelled():
            task.exception()  # a caller that is still there is told; for one that is not, there is nobody to tell
