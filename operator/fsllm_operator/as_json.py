"""The server's answers as plain JSON objects: the stable form of every ``--json``. Digests are hex, times ISO 8601."""

import json
from collections.abc import Iterable
from typing import Any, TypeAlias

from google.protobuf.timestamp_pb2 import Timestamp

from fsllm.v1.control_pb2 import Commit, GetServerResponse, Member, RoundManifest, Run, WatchRunResponse
from fsllm.v1.federation_pb2 import Metric
from fsllm_operator.watching import STATUS_NAMES

Object: TypeAlias = dict[str, Any]


def run_object(run: Run) -> Object:
    """Return a run; plan, members and commits are present when the server sent them."""
    return {
        "run_id": run.run_id,
        "name": run.name,
        "status": STATUS_NAMES[run.status],
        "phase": run.phase,
        "round": run.round,
        "rounds": run.rounds,
        "created": _time(run.created),
        "message": run.message,
        "members": [
            {
                "name": member.name,
                "role": member.role,
                "attached": member.attached,
                "standing": member.standing,
                "message": member.message,
                "epsilon": member.epsilon if member.has_epsilon else None,
            }
            for member in run.members
        ],
        "commits": [commit_object(commit) for commit in run.commits],
        "plan": json.loads(run.plan) if run.plan else None,
    }


def commit_object(commit: Commit) -> Object:
    """Return a committed round."""
    return {
        "round": commit.round,
        "version": commit.version.number,
        "digest": commit.version.digest.hex(),
        "payload_bytes": commit.version.payload_bytes,
        "at": _time(commit.at),
        "contributions": [
            {
                "member": c.member,
                "digest": c.digest.hex(),
                "payload_bytes": c.payload_bytes,
                "examples": c.examples,
                "tokens": c.tokens,
                "weight": c.weight,
                "metrics": _metrics(c.metrics),
            }
            for c in commit.contributions
        ],
        "metrics": [{"member": m.member, "role": m.role, "metrics": _metrics(m.metrics)} for m in commit.metrics],
        "phase_seconds": dict(sorted(commit.phase_seconds.items())),
        "manifest_digest": commit.manifest_digest.hex(),
    }


def manifest_object(manifest: RoundManifest) -> Object:
    """Return a round's manifest with its digest, which is that of ``round_manifest.encode(manifest)``."""
    return {"digest": manifest.digest.hex() or None, "manifest": json.loads(manifest.body)}


def event_object(event: WatchRunResponse) -> Object:
    """Return one event of a watched run."""
    told: Object = {
        "sequence": event.sequence,
        "at": _time(event.at),
        "round": event.round,
        "kind": event.kind,
        "subject": event.subject,
        "message": event.message,
        "metrics": _metrics(event.metrics),
    }
    if event.HasField("progress"):
        progress = event.progress
        told["progress"] = {
            "activity": progress.activity,
            "done": progress.done,
            "total": progress.total,
            "metrics": _metrics(progress.metrics),
        }
    if event.HasField("commit"):
        told["commit"] = commit_object(event.commit)
    return told


def member_object(member: Member) -> Object:
    """Return a member of the federation."""
    capabilities = member.capabilities
    return {
        "name": member.name,
        "role": member.role,
        "standing": member.standing,
        "attached": member.attached,
        "certificate_not_after": _time(member.certificate_not_after),
        "software_version": member.software_version,
        "gpus": capabilities.gpus,
        "gpu_memory_bytes": capabilities.gpu_memory_bytes,
        "host_memory_bytes": capabilities.host_memory_bytes,
        "trainer": capabilities.trainer,
    }


def server_object(server: GetServerResponse) -> Object:
    """Return what the server says of itself."""
    return {
        "software_version": server.software_version,
        "federation": server.federation,
        "now": _time(server.now),
        "certificate_not_after": _time(server.certificate_not_after),
        "disk_free_bytes": server.disk_free_bytes,
        "attached_members": server.attached_members,
        "key_exchange_group": server.key_exchange_group,
    }


def _metrics(metrics: Iterable[Metric]) -> list[Object]:
    return [{"name": m.name, "value": m.value, "weight": m.weight} for m in metrics]


def _time(at: Timestamp) -> str | None:
    return at.ToJsonString() if at.seconds or at.nanos else None
