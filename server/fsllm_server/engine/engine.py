"""The engine's front: what services call. It finds the run, and lets the run's shell do the rest."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import aclosing
from typing import Literal

from fsllm.v1 import control_pb2, federation_pb2
from fsllm.v1.tensors_pb2 import Manifest
from fsllm_common.errors import FsllmError, Refused
from fsllm_common.plan import Plan
from fsllm_common.telemetry.metrics import ServerMetrics
from fsllm_server.engine import core, views
from fsllm_server.engine.events import (
    Answered,
    Cancelled,
    Event,
    MemberAttached,
    MemberDetached,
    MemberForgotten,
    Paused,
    Restored,
    Resumed,
    ServerRestarted,
)
from fsllm_server.engine.manifests import links
from fsllm_server.engine.meter import Meter
from fsllm_server.engine.retention import Retention
from fsllm_server.engine.runner import Outside, Runner, stopping
from fsllm_server.engine.session import Session
from fsllm_server.engine.state import Run
from fsllm_server.engine.submissions import Submissions
from fsllm_server.engine.sweeping import Sweeper
from fsllm_server.engine.uploads import Expected, Uploads
from fsllm_server.engine.verifier import Verifier
from fsllm_server.store.blobs import Blobs, StoredVersion
from fsllm_server.store.events import Entry, EventLog, RunRecord
from fsllm_server.store.restored import Restoration
from fsllm_server.store.spools import Spools, VerifiedSpool

__all__ = ["Engine", "Expected", "Session"]


class Engine:
    """All runs of a server. Lives in one event loop; none of its methods may be called from another thread."""

    def __init__(
        self,
        log: EventLog,
        blobs: Blobs,
        spools: Spools,
        metrics: ServerMetrics,
        *,
        clock: Callable[[], float] = time.time,
        retention: Retention | None = None,
    ) -> None:
        self._blobs = blobs
        self._spools = spools
        self._clock = clock
        self._log = log
        self._meter = Meter(metrics)
        self._runners: dict[str, Runner] = {}
        self._submissions = Submissions(log, clock, self._begin)
        self._sessions: dict[str, Session] = {}
        self._stopped = False
        self._uploads = Uploads(blobs, spools, clock)
        self._verifier = Verifier(blobs, spools)
        self.sweeper = Sweeper(spools, retention or Retention(), self._state, clock)
        sweep, make_room = self.sweeper.sweep, self.sweeper.make_room
        self._outside = Outside(
            self._log, blobs, spools, self._meter, clock, self._deliver, sweep, make_room, self._count
        )

    async def start(self, restoration: Restoration | None = None) -> None:
        """Replay the logs and go on with every run that has not ended.

        Args:
            restoration: Of the state from a back-up, when this is the first start since; it is recorded in every run.

        Raises:
            FsllmError: STATE_CORRUPT, DISK_FULL.

        """
        for record in await self._log.runs():
            self._add(record, await self._log.replay(record.id))
        for run in self._spools.runs():
            if run not in self._runners:
                # They would be swept away, though members have a receipt for them.
                message = f"{self._spools.folder} holds uploads of run {run}, which the database does not know"
                cure = "Start with the database of this state folder (--database); restore both from one back-up."
                raise FsllmError("STATE_CORRUPT", message, cure=cure)
        await self.sweeper.sweep()
        if restoration is not None:
            restored = Restored(at=self._clock(), epoch=restoration.epoch, made=restoration.made)
            await asyncio.gather(*(runner.ask(restored) for runner in self._live()))
        restarted = ServerRestarted(at=self._clock())
        await asyncio.gather(*(runner.ask(restarted) for runner in self._live()))
        self._count()

    async def stop(self) -> None:
        """Park: sessions end with SERVER_STOPPING and nothing more is decided. What is recorded is complete."""
        self._stopped = True
        self._verifier.stop()
        for session in self._sessions.values():
            session.end(stopping())
        self._sessions.clear()
        await self._submissions.stop()
        await asyncio.gather(*(runner.stop() for runner in self._runners.values()))

    # Operators.

    async def submit(self, plan: Plan, request_id: str) -> str:
        """Record a run, start it, and return its id. The same request again returns the same run.

        Raises:
            PlanInvalid: The algorithm is not installed here, or the request_id was another plan's.
            FsllmError: DISK_FULL, STATE_CORRUPT, SERVER_STOPPING.

        """
        if self._stopped:
            raise stopping()
        return await self._submissions.submit(plan, request_id)

    def list_runs(self) -> list[control_pb2.Run]:
        """Return all runs, oldest first, without plan, members and commits."""
        return [views.summary(runner.run) for runner in self._runners.values()]

    def get_run(self, run: str) -> control_pb2.Run:
        """Return everything about a run, named by its id, a prefix of it, or its name.

        Raises:
            FsllmError: RUN_UNKNOWN: it fits no run, or several.

        """
        runner = self._find(run)
        return views.detail(runner.run, runner.plan)

    def watch(self, run: str, after: int) -> AsyncIterator[control_pb2.WatchRunResponse]:
        """Return the run's recorded events after sequence ``after``, then live ones, until the run has ended.

        Raises:
            FsllmError: RUN_UNKNOWN, at the call; SERVER_STOPPING, from the stream.

        """
        return self._find(run).watch(after)

    async def pause(self, run: str) -> None:
        """Withdraw the run's orders and decide nothing more until it is resumed; what is acknowledged stays.

        Raises:
            FsllmError: RUN_UNKNOWN, RUN_ENDED.

        """
        await self._find(run).ask(Paused(at=self._clock()))

    async def resume(self, run: str) -> None:
        """Go on with a paused run.

        Raises:
            FsllmError: RUN_UNKNOWN, RUN_ENDED, RUN_NOT_PAUSED.

        """
        await self._find(run).ask(Resumed(at=self._clock()))

    async def cancel(self, run: str) -> None:
        """End a run. Its committed versions stay.

        Raises:
            FsllmError: RUN_UNKNOWN, RUN_ENDED.

        """
        await self._find(run).ask(Cancelled(at=self._clock()))

    def manifests(self, run: str) -> Iterator[control_pb2.RoundManifest]:
        """Return the manifest of every committed round, from round 0 on, each made as it is asked for.

        Raises:
            FsllmError: RUN_UNKNOWN.

        """
        runner = self._find(run)
        return (views.manifest(round_, link) for round_, link in enumerate(links(runner.run, runner.recorded)))

    async def verify(self, run: str, round_: int | None) -> AsyncGenerator[control_pb2.VerifyRunResponse]:
        """Look at committed rounds (one, or all) again; yields progress and findings.

        Raises:
            FsllmError: RUN_UNKNOWN, VERSION_UNKNOWN: the round is not committed.

        """
        runner = self._find(run)
        known, recorded = runner.run, runner.recorded
        if round_ is not None and round_ >= len(recorded):
            message = f"Run {known.plan.name} ({known.id}) has not committed round {round_}"
            raise FsllmError("VERSION_UNKNOWN", message)
        rounds = range(len(recorded)) if round_ is None else range(round_, round_ + 1)
        entries = await self._log.replay(known.id)
        async with aclosing(self._verifier.verify(known, recorded, entries, rounds)) as findings:
            async for found in findings:
                yield views.verified(found)
        if self._stopped:
            raise stopping()

    def version(self, run: str, number: int | None, part: str = "") -> StoredVersion:
        """Return a part of a committed version, the latest when ``number`` is None; its manifest has adapter_config.

        Raises:
            FsllmError: RUN_UNKNOWN, VERSION_UNKNOWN.

        """
        found = self._find(run).run
        if not found.commits or not 0 <= (at := len(found.commits) - 1 if number is None else number) < len(
            found.commits
        ):
            which = "a version" if number is None else f"version {number}"
            raise FsllmError("VERSION_UNKNOWN", f"Run {found.plan.name} ({found.id}) has not committed {which}")
        parts = found.commits[at].version.parts
        wanted = [one for one in parts if one.name == part or (not part and len(parts) == 1)]
        if not wanted:
            message = f"Version {at} of run {found.plan.name} has the parts {', '.join(one.name for one in parts)}"
            raise FsllmError("VERSION_UNKNOWN", f"{message}; {part[:80]!r} is none of them")
        return self._published(wanted[0].digest, found.adapter_config)

    # Members.

    def attach(self, member: str, role: str, hello: federation_pb2.Hello) -> Session:
        """Open a member's session; one that it had ends with ATTACHED_ELSEWHERE.

        Args:
            member: The name in its certificate.
            role: site or evaluator.
            hello: What it said first.

        Raises:
            FsllmError: SERVER_STOPPING.

        """
        if self._stopped:
            raise stopping()
        session = Session(member, role, hello, self._detach)
        if (before := self._sessions.get(member)) is not None:
            before.end(FsllmError("ATTACHED_ELSEWHERE", f"Another daemon has attached as {member}"))
        self._sessions[member] = session
        for live in self._live():
            live.post(self._attached(session, live.run.id))
        for order_id in hello.held_orders:
            runner = self._runners.get(_run_of(order_id))
            if runner is None or runner.run.status.ended:
                reason, message = "ORDER_UNKNOWN", "No run here has given this order"
                if runner is not None:
                    reason, message = core.unwanted(runner.run, order_id)
                withdraw = federation_pb2.Withdraw(order_id=order_id, reason=reason, message=message)
                session.send(federation_pb2.AttachResponse(withdraw=withdraw))
        return session

    async def answer(self, member: str, answer: federation_pb2.Answer) -> None:
        """Take a member's answer to an order; it is recorded when this returns.

        Raises:
            FsllmError: ORDER_UNKNOWN: the order is not (or no longer) the member's; DISK_FULL; SERVER_STOPPING.

        """
        runner = self._runners.get(_run_of(answer.order_id))
        order = runner.run.orders.get(answer.order_id) if runner is not None else None
        if runner is None or order is None or order.member != member:
            raise FsllmError("ORDER_UNKNOWN", f"{member} has no open order {answer.order_id[:80]!r}")
        runner.touch(member)
        outcome = answer.WhichOneof("outcome")
        if outcome == "accepted" or outcome is None:
            return  # changes nothing but the idle clock
        said = answer.declined if outcome == "declined" else answer.failed
        await runner.ask(
            Answered(
                at=self._clock(),
                member=member,
                order_id=order.id,
                outcome=outcome,
                reason=said.reason[:64],
                message=said.message[:1000],
                metrics=views.metrics_of(answer.done.metrics),
                rank=answer.done.rank if answer.done.rank in runner.run.plan.adapter.ranks else 0,
            )
        )

    def progress(self, member: str, progress: federation_pb2.Progress) -> None:
        """Take a member's progress on an order, for the idle watch and for those who watch. Not recorded."""
        if (runner := self._runners.get(_run_of(progress.order_id))) is not None:
            runner.progress(member, progress)

    def touch(self, member: str, run: str) -> None:
        """Note that bytes of the member's transfer for a run have advanced."""
        if (runner := self._runners.get(run)) is not None:
            runner.touch(member)

    def blob(self, member: str, digest: bytes) -> StoredVersion:
        """Return a version, committed or candidate, of a run that the member takes part in.

        Raises:
            FsllmError: BLOB_UNKNOWN.

        """
        wanted = digest.hex()
        for runner in self._runners.values():
            run = runner.run
            if member in run.members:
                versions = [run.zero, run.candidate, *(commit.version for commit in reversed(run.commits))]
                if any(part.digest == wanted for version in versions if version is not None for part in version.parts):
                    return self._published(wanted, run.adapter_config)
        raise FsllmError("BLOB_UNKNOWN", f"No run of {member} has a version {wanted[:12]}")

    # Uploads: expect, then Spools.open and Spool.write, then Spool.verify, then record.

    def expect_upload(self, member: str, begin: federation_pb2.UploadBegin) -> federation_pb2.Receipt | Expected:
        """Say whether an upload is wanted: what to expect, or the receipt when this very payload is recorded already.

        Raises:
            FsllmError: NOT_WANTED, ROUND_CLOSED, BASE_STALE, UPDATE_CONFLICT, MANIFEST_INVALID.

        """
        return self._uploads.expect(self._run(begin.run_id), member, begin)

    async def record_upload(self, expected: Expected, spool: VerifiedSpool) -> federation_pb2.Receipt:
        """Record a verified upload; it counts, exactly once, when this returns.

        Raises:
            FsllmError: ROUND_CLOSED, NOT_WANTED, UPDATE_CONFLICT: things changed while it was on its way; DISK_FULL.

        """
        runner = self._runners[expected.run_id]
        try:
            await runner.ask(self._uploads.event(expected, spool))
        except FsllmError as error:
            if error.reason == "UPDATE_CONFLICT":
                # Another stream of the same site may have delivered the same payload.
                receipt = self._uploads.receipt(runner.run, expected.member, expected.round, spool.manifest.digest)
                if receipt is not None:
                    return receipt
            if error.reason in ("UPDATE_CONFLICT", "ROUND_CLOSED", "NOT_WANTED", "MODEL_DIGEST_MISMATCH"):
                self._meter.rejected(error.reason)
            raise
        return federation_pb2.Receipt(digest=spool.manifest.digest, payload_bytes=spool.manifest.payload_bytes)

    async def reject_upload(self, expected: Expected, error: FsllmError) -> None:
        """Record, for those who watch, that an upload was refused."""
        self._meter.rejected(error.reason)
        if error.reason == "DISK_FULL":
            await self.sweeper.make_room()
        await self._runners[expected.run_id].ask(self._uploads.rejection(expected, error))

    def upload_status(
        self,
        member: str,
        run: str,
        round: int,  # noqa: A002 - the domain's word
        digest: bytes,
    ) -> federation_pb2.UploadStatusResponse:
        """Say how much of a payload is held, with its receipt when it is recorded. 0 of what nobody knows."""
        runner = self._runners.get(run)
        return self._uploads.status(runner.run if runner is not None else None, member, round, digest)

    async def forget_member(self, member: str) -> None:
        """Drop a revoked member from every run and end its session with MEMBER_REVOKED."""
        if (session := self._sessions.pop(member, None)) is not None:
            session.end(Refused("MEMBER_REVOKED", f"{member} is revoked"))
        event = MemberForgotten(at=self._clock(), member=member)
        await asyncio.gather(*(runner.ask(event) for runner in self._live()))

    # Inside.

    def _begin(self, record: RunRecord, first: Entry) -> None:
        runner = self._add(record, [first])
        for session in self._sessions.values():
            runner.post(self._attached(session, record.id))
        self._count()

    def _add(self, record: RunRecord, entries: list[Entry]) -> Runner:
        runner = self._runners[record.id] = Runner(record, entries, self._outside)
        self._submissions.note(record)
        runner.start()
        return runner

    def _live(self) -> list[Runner]:
        return [runner for runner in self._runners.values() if not runner.run.status.ended]

    def _run(self, run_id: str) -> Runner:
        if (runner := self._runners.get(run_id)) is None:
            raise FsllmError("NOT_WANTED", f"There is no run {run_id[:80]!r}")
        return runner

    def _state(self, run_id: str) -> Run | None:
        runner = self._runners.get(run_id)
        return runner.run if runner is not None else None

    def _find(self, text: str) -> Runner:
        if (exact := self._runners.get(text)) is not None:
            return exact
        fitting = [
            runner
            for run_id, runner in self._runners.items()
            if text and (run_id.startswith(text) or runner.run.plan.name == text)
        ]
        if len(fitting) == 1:
            return fitting[0]
        if fitting:
            raise FsllmError("RUN_UNKNOWN", f"{text!r} fits several runs: {', '.join(r.run.id for r in fitting)}")
        raise FsllmError("RUN_UNKNOWN", f"There is no run {text[:80]!r}")

    def _published(self, digest: str, adapter_config: str) -> StoredVersion:
        stored = self._blobs.get(bytes.fromhex(digest))
        manifest = Manifest()
        manifest.CopyFrom(stored.manifest)
        manifest.adapter_config = adapter_config
        return StoredVersion(manifest, stored.payload)

    def _attached(self, session: Session, run_id: str) -> Event:
        role: Literal["site", "evaluator"] = "evaluator" if session.role == "evaluator" else "site"
        held = tuple(order_id for order_id in session.hello.held_orders if _run_of(order_id) == run_id)
        return MemberAttached(at=self._clock(), member=session.member, role=role, held=held)

    def _detach(self, session: Session) -> None:
        # A session that another one has replaced is not its member's presence any more.
        if self._sessions.get(session.member) is session:
            del self._sessions[session.member]
            for runner in self._live():
                runner.post(MemberDetached(at=self._clock(), member=session.member))

    def _deliver(self, member: str, response: federation_pb2.AttachResponse) -> None:
        if (session := self._sessions.get(member)) is not None:
            session.send(response)

    def _count(self) -> None:
        self._meter.runs(runner.run for runner in self._runners.values())


def _run_of(order_id: str) -> str:
    """Return the run that an order belongs to; see Turn.issue."""
    return order_id.partition(".")[0]
