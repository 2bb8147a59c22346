"""What the table-driven test sends: for each name of a row, the rpc and its requests in raw bytes."""

from collections.abc import Callable
from typing import Any

from tests.fault.stage import Stage
from tests.system.peer import Tensors

from fsllm.v1 import control_pb2 as control
from fsllm.v1 import federation_pb2 as pb
from fsllm.v1.tensors_pb2 import Manifest, ManifestPart, TensorSpec
from fsllm_common.tensors.chunks import frame_chunk

Requests = list[bytes]

GARBAGE = b"\xff\xff\xff"
"""No message of any kind."""

UNKNOWN_FIELD = b"\xfa\x3e\x05extra"
"""Field 1007, of a protocol yet to come."""


def upload(stage: Stage, state: str, tensors: Tensors, whose: str = "anna", **changes: Any) -> bytes:  # noqa: ANN401
    """Announce a payload in answer to the order that ``whose`` has (or had last) in the run of ``state``."""
    order = stage.orders[state].get(whose) or pb.Order(order_id=f"{stage.runs[state]}.1.train.{whose}.6", round=1)
    begin = tensors.begin(order, **{"run_id": stage.runs[state], **changes})
    return pb.UploadRequest(begin=begin).SerializeToString()


def liar(stage: Stage, state: str) -> bytes:
    """Announce more bytes than the tensors have."""
    manifest = Manifest()
    manifest.CopyFrom(stage.other.manifest)
    manifest.payload_bytes += 4
    return upload(stage, state, stage.other, manifest=manifest)


def round_of(stage: Stage, state: str) -> int:
    order = stage.orders[state].get("anna")
    return order.round if order is not None else 0


UPLOADS: dict[str, Callable[[Stage, str], Requests]] = {
    "own": lambda stage, state: [upload(stage, state, stage.other)],
    "again": lambda stage, state: [upload(stage, state, stage.delta)],
    "bert's": lambda stage, state: [upload(stage, state, stage.other, "bert")],
    "made-up": lambda stage, state: [upload(stage, state, stage.other, order_id="made.up")],
    "stale": lambda stage, state: [upload(stage, state, stage.other, base_digest=bytes(32))],
    "later": lambda stage, state: [upload(stage, state, stage.other, round=round_of(stage, state) + 1)],
    "liar": lambda stage, state: [liar(stage, state)],
    "extra": lambda stage, state: [upload(stage, state, stage.other) + UNKNOWN_FIELD],
    "chunk": lambda stage, state: [frame_chunk(0, b"data"), upload(stage, state, stage.other)],
    "part": lambda stage, state: [
        pb.UploadRequest(part=ManifestPart(tensors=[TensorSpec(name="a")])).SerializeToString()
    ],
    "nothing": lambda stage, state: [b""],
    "garbage": lambda stage, state: [GARBAGE],
}


def _attach(*requests: pb.AttachRequest) -> Requests:
    return [request.SerializeToString() for request in requests]


HELLO = pb.AttachRequest(hello=pb.Hello(protocol_version=1, software_version="test"))

ATTACHES: dict[str, Callable[[Stage, str], Requests]] = {
    "nothing": lambda stage, state: [],
    "empty": lambda stage, state: [b""],
    "garbage": lambda stage, state: [GARBAGE],
    "heartbeat": lambda stage, state: _attach(pb.AttachRequest(heartbeat=pb.Heartbeat())),
    "answer": lambda stage, state: _attach(pb.AttachRequest(answer=pb.Answer(order_id="x", done=pb.Done()))),
    "progress": lambda stage, state: _attach(pb.AttachRequest(progress=pb.Progress(order_id="x"))),
    "version 99": lambda stage, state: _attach(pb.AttachRequest(hello=pb.Hello(protocol_version=99))),
    "huge": lambda stage, state: _attach(
        pb.AttachRequest(hello=pb.Hello(protocol_version=1, held_orders=["x" * 100] * 1000))
    ),
    "escapes": lambda stage, state: _attach(
        pb.AttachRequest(hello=pb.Hello(protocol_version=1, software_version="\x1b[2J"))
    ),
}


def _run(method: str, **fields: Any) -> Callable[[Stage, str], Requests]:  # noqa: ANN401
    def make(stage: Stage, state: str) -> Requests:
        request: Any = getattr(control, f"{method}Request")
        return [request(run_id=stage.runs[state], **fields).SerializeToString() + UNKNOWN_FIELD]

    return make


def _bytes(message: Any) -> Callable[[Stage, str], Requests]:  # noqa: ANN401
    return lambda stage, state: [message.SerializeToString()]


def _download(stage: Stage, state: str) -> Requests:
    return [pb.DownloadRequest(run_id=stage.runs[state], digest=stage.zero.manifest.digest).SerializeToString()]


def _status(stage: Stage, state: str) -> Requests:
    digest = stage.delta.manifest.digest
    return [pb.UploadStatusRequest(run_id=stage.runs[state], round=1, digest=digest).SerializeToString()]


MESSAGES: dict[str, tuple[str, Callable[[Stage, str], Requests]]] = {
    **{f"Upload {name}": ("Federation/Upload", make) for name, make in UPLOADS.items()},
    **{f"Attach {name}": ("Federation/Attach", make) for name, make in ATTACHES.items()},
    "Download zero": ("Federation/Download", _download),
    "Download other": ("Federation/Download", _bytes(pb.DownloadRequest(digest=bytes(32)))),
    "Download huge": ("Federation/Download", _bytes(pb.DownloadRequest(digest=bytes(100_000)))),
    "UploadStatus own": ("Federation/UploadStatus", _status),
    "UploadStatus huge": ("Federation/UploadStatus", _bytes(pb.UploadStatusRequest(digest=bytes(100_000)))),
    "UploadStatus empty": ("Federation/UploadStatus", _run("GetRun")),
    "Renew none": ("Federation/Renew", _bytes(pb.RenewRequest(csr=b"none"))),
    "Renew huge": ("Federation/Renew", _bytes(pb.RenewRequest(csr=b"x" * 1_000_000))),
    "GetRun": ("Control/GetRun", _run("GetRun")),
    "WatchRun": ("Control/WatchRun", _run("WatchRun")),
    "ExportRun": ("Control/ExportRun", _run("ExportRun")),
    "ExportRun v9": ("Control/ExportRun", _run("ExportRun", version=9)),
    "ListManifests": ("Control/ListManifests", _run("ListManifests")),
    "VerifyRun": ("Control/VerifyRun", _run("VerifyRun")),
    "VerifyRun 9": ("Control/VerifyRun", _run("VerifyRun", round=9)),
    "PauseRun": ("Control/PauseRun", _run("PauseRun")),
    "ResumeRun": ("Control/ResumeRun", _run("ResumeRun")),
    "CancelRun": ("Control/CancelRun", _run("CancelRun")),
    "SubmitRun none": ("Control/SubmitRun", _bytes(control.SubmitRunRequest(plan=b"", request_id="x"))),
    "SubmitRun deep": ("Control/SubmitRun", _bytes(control.SubmitRunRequest(plan=b"[" * 100_000, request_id="x"))),
    "ListRuns": ("Control/ListRuns", _bytes(control.ListRunsRequest())),
    "Invite anna": ("Control/Invite", _bytes(control.InviteRequest(name="anna", role="site", valid_seconds=60))),
    "Invite newline": ("Control/Invite", _bytes(control.InviteRequest(name="a\n", role="site", valid_seconds=60))),
    "Invite forever": (
        "Control/Invite",
        _bytes(control.InviteRequest(name="new", role="site", valid_seconds=(1 << 64) - 1)),
    ),
    "RevokeMember x": ("Control/RevokeMember", _bytes(control.RevokeMemberRequest(name="x"))),
    "ListMembers": ("Control/ListMembers", _bytes(control.ListMembersRequest())),
    "GetServer": ("Control/GetServer", _bytes(control.GetServerRequest())),
    **{
        f"{method} garbage": (f"{service}/{method}", lambda stage, state: [GARBAGE])
        for service, methods in (
            ("Federation", "Download UploadStatus Renew"),
            ("Control", "GetRun SubmitRun Invite RevokeMember"),
        )
        for method in methods.split()
    },
}
