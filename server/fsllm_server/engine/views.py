"""The state as protobuf messages: for operators and members."""

from __future__ import annotations

from collections.abc import Iterable

from google.protobuf.timestamp_pb2 import Timestamp

from fsllm.v1 import control_pb2, federation_pb2
from fsllm_common.round_manifest import Link
from fsllm_server.engine import state
from fsllm_server.engine.effects import Notify, WithdrawOrder
from fsllm_server.engine.events import Metric
from fsllm_server.engine.phases import PHASES
from fsllm_server.engine.state import Kind, Run, Status
from fsllm_server.engine.verifying import Finding, Progress, Verdict

_STATUS = {
    Status.RUNNING: control_pb2.RUN_STATUS_RUNNING,
    Status.PAUSED: control_pb2.RUN_STATUS_PAUSED,
    Status.DONE: control_pb2.RUN_STATUS_DONE,
    Status.CANCELLED: control_pb2.RUN_STATUS_CANCELLED,
}

_VERDICT = {
    Verdict.RECOMPUTED: control_pb2.ROUND_VERDICT_RECOMPUTED,
    Verdict.CHAIN_ONLY: control_pb2.ROUND_VERDICT_CHAIN_ONLY,
    Verdict.BROKEN: control_pb2.ROUND_VERDICT_BROKEN,
}

_KIND = {
    Kind.JOIN: federation_pb2.ORDER_KIND_JOIN,
    Kind.BUILD: federation_pb2.ORDER_KIND_BUILD,
    Kind.CHECK: federation_pb2.ORDER_KIND_CHECK,
    Kind.TRAIN: federation_pb2.ORDER_KIND_TRAIN,
    Kind.EVALUATE: federation_pb2.ORDER_KIND_EVALUATE,
}


def summary(run: Run) -> control_pb2.Run:
    """Return a run without plan, members and commits, as listings show it."""
    return control_pb2.Run(
        run_id=run.id,
        name=run.plan.name,
        status=_STATUS[run.status],
        phase=run.phase,
        round=run.round,
        rounds=run.plan.rounds,
        created=_time(run.created),
        message=run_message(run),
    )


def detail(run: Run, plan: bytes) -> control_pb2.Run:
    """Return everything about a run. ``plan`` is its canonical JSON."""
    shown = summary(run)
    shown.members.extend(_member(run.members[name]) for name in sorted(run.members))
    shown.commits.extend(commit(one) for one in run.commits)
    shown.plan = plan
    return shown


def run_message(run: Run) -> str:
    """Return what the run waits for, or why it does not go on, e.g. 'recruit: waiting for 1 more of 2 sites'."""
    if not run.active:
        return f"{run.message} [{run.reason}]" if run.reason else run.message
    described = PHASES[run.phase].describe(run)
    return f"{run.phase}: {described}" if described else run.phase


def commit(done: state.Commit) -> control_pb2.Commit:
    """Return a commit."""
    return control_pb2.Commit(
        round=done.round,
        version=version(done.version),
        at=_time(done.at),
        contributions=[
            control_pb2.Contribution(
                member=one.update.member,
                digest=bytes.fromhex(one.update.digest),
                payload_bytes=one.update.payload_bytes,
                examples=one.update.examples,
                tokens=one.update.tokens,
                weight=one.weight,
                metrics=_metrics(one.update.metrics),
            )
            for one in done.contributions
        ],
        metrics=[
            control_pb2.MemberMetrics(member=one.member, role=one.role, metrics=_metrics(one.metrics))
            for one in done.evaluations
        ],
        phase_seconds=dict(done.phase_seconds),
        manifest_digest=bytes.fromhex(done.manifest),
    )


def manifest(round_: int, link: Link) -> control_pb2.RoundManifest:
    """Return a committed round's manifest."""
    return control_pb2.RoundManifest(round=round_, body=link.body, digest=bytes.fromhex(link.recorded))


def verified(found: Progress | Finding) -> control_pb2.VerifyRunResponse:
    """Return what a verification tells."""
    if isinstance(found, Progress):
        progress = control_pb2.VerifyProgress(round=found.round, done_bytes=found.done, total_bytes=found.total)
        return control_pb2.VerifyRunResponse(progress=progress)
    finding = control_pb2.RoundFinding(
        manifest=manifest(found.round, found.link),
        verdict=_VERDICT[found.verdict],
        problems=found.problems,
        note=found.note,
    )
    return control_pb2.VerifyRunResponse(finding=finding)


def notice(sequence: int, at: float, effect: Notify) -> control_pb2.WatchRunResponse:
    """Return what those who watch are told."""
    told = control_pb2.WatchRunResponse(
        sequence=sequence,
        at=_time(at),
        round=effect.round,
        kind=effect.kind,
        subject=effect.subject,
        message=effect.message,
        metrics=_metrics(effect.metrics),
    )
    if effect.commit is not None:
        told.commit.CopyFrom(commit(effect.commit))
    return told


def progress_notice(
    at: float, round_: int, member: str, progress: federation_pb2.Progress
) -> control_pb2.WatchRunResponse:
    """Return a member's live progress, which is not recorded."""
    of = f" {progress.done} of {progress.total}" if progress.total else ""
    return control_pb2.WatchRunResponse(
        at=_time(at),
        round=round_,
        kind="progress",
        subject=member,
        message=f"{member} {progress.activity}{of}",
        metrics=progress.metrics,
        progress=progress,
    )


def order(run: Run, open_order: state.Order, plan: bytes) -> federation_pb2.AttachResponse:
    """Return an order as it is sent."""
    sent = federation_pb2.Order(
        order_id=open_order.id, run_id=run.id, round=open_order.round, kind=_KIND[open_order.kind], plan=plan
    )
    if open_order.base is not None:
        sent.base.CopyFrom(version(open_order.base))
    return federation_pb2.AttachResponse(order=sent)


def withdrawal(effect: WithdrawOrder) -> federation_pb2.AttachResponse:
    """Return a withdrawal as it is sent."""
    withdraw = federation_pb2.Withdraw(order_id=effect.order_id, reason=effect.reason, message=effect.message)
    return federation_pb2.AttachResponse(withdraw=withdraw)


def version(one: state.Version) -> federation_pb2.Version:
    """Return a version's name and size."""
    return federation_pb2.Version(
        number=one.number,
        digest=bytes.fromhex(one.digest),
        payload_bytes=one.payload_bytes,
        parts=[
            federation_pb2.VersionPart(
                name=part.name, digest=bytes.fromhex(part.digest), payload_bytes=part.payload_bytes
            )
            for part in (one.parts if len(one.parts) > 1 else ())
        ],
    )


def metrics_of(sent: Iterable[federation_pb2.Metric]) -> tuple[Metric, ...]:
    """Return what a member has reported, as events keep it."""
    return tuple(Metric(name=one.name, value=one.value, weight=one.weight) for one in sent)


def _member(member: state.Member) -> control_pb2.RunMember:
    return control_pb2.RunMember(
        name=member.name,
        role=member.role,
        attached=member.attached,
        standing=member.standing,
        message=member.message,
        epsilon=member.epsilon or 0.0,
        has_epsilon=member.epsilon is not None,
    )


def _metrics(metrics: Iterable[Metric]) -> list[federation_pb2.Metric]:
    return [federation_pb2.Metric(name=one.name, value=one.value, weight=one.weight) for one in metrics]


def _time(seconds: float) -> Timestamp:
    stamp = Timestamp()
    stamp.FromNanoseconds(int(seconds * 1e9))
    return stamp
