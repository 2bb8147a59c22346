"""What happened, as seen from outside: who sent what, what came back, who died and when.

The checker reads nothing else but this, the durable log and the disks. Nothing that a dead process does is noted.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import grpc

from fsllm.v1 import control_pb2, federation_pb2
from fsllm_common.errors import FsllmError
from fsllm_common.rpc_errors import error_from
from fsllm_common.tensors.chunks import Piece, parse_upload
from simulation.loop import CURRENT, Loop

if TYPE_CHECKING:
    from simulation.calls import Call

KINDS = {value: name.removeprefix("ORDER_KIND_").lower() for name, value in federation_pb2.OrderKind.items()}
DROPPING = frozenset({"DIGEST_MISMATCH", "NOT_FINITE", "NORM_TOO_LARGE", "STATE_CORRUPT", "DISK_FULL"})
"""Reasons after which the server need not hold an upload's bytes: they are wrong, or may not be on its disk."""

TOO_MANY = 30_000
"""Events of one seed; a few hundred are usual, a few thousand a lot."""


@dataclass(frozen=True, slots=True)
class Event:
    at: float
    who: str
    what: str
    facts: dict[str, Any]

    def __str__(self) -> str:
        shown = " ".join(f"{name}={_short(value)}" for name, value in self.facts.items())
        return f"{self.at:10.4f}  {self.who:<12} {self.what:<12} {shown}"


@dataclass
class Upload:
    """What is known of the begin of an Upload call."""

    member: str
    begin: federation_pb2.UploadBegin

    @property
    def key(self) -> tuple[str, str, int]:
        return self.member, self.begin.run_id, self.begin.round


@dataclass
class History:
    loop: Loop
    root: str
    """The folder of all disks. Its name has the same length every time: names travel, and bytes take time."""
    events: list[Event] = field(default_factory=list)
    reached: Callable[[str], None] = lambda point: None
    """Called at the simulation's own failpoints."""
    overflow: Callable[[], None] = lambda: None
    """Called when there is no end of it."""
    counts: Counter[str] = field(default_factory=Counter)
    """What the seeds have covered."""
    ready: "dict[Call, None]" = field(default_factory=dict)
    """The Upload calls that hold a slot."""
    uploads: "dict[Call, Upload]" = field(default_factory=dict)
    payloads: dict[str, dict[int, bytes]] = field(default_factory=dict)
    """By digest: what was sent at each offset."""
    honest: dict[str, bytes] = field(default_factory=dict)
    """By digest: what the liar should send, whatever else it sends under that digest."""
    held: dict[tuple[str, str, int], tuple[bytes, int]] = field(default_factory=dict)
    """By member, run and round: the digest of the upload and how many of its bytes the server surely holds."""

    def note(self, what: str, who: str = "", **facts: Any) -> None:  # noqa: ANN401
        process = CURRENT.get()
        if process is None or process.alive:
            self.events.append(Event(self.loop.now, who or (process.name if process else "-"), what, facts))
            self.counts[what] += 1
            if len(self.events) == TOO_MANY:
                self.overflow()

    def of(self, *kinds: str) -> Iterator[Event]:
        return (event for event in self.events if event.what in kinds)

    def payload(self, digest: str) -> bytes:
        """Return what was sent under a digest."""
        if digest in self.honest:
            return self.honest[digest]
        whole = bytearray()
        for offset, data in sorted(self.payloads.get(digest, {}).items()):
            whole[offset : offset + len(data)] = data
        return bytes(whole)

    def digest(self) -> str:
        """Return the hash of everything that happened, but for where the disks lie and what was logged."""
        text = "\n".join(str(event) for event in self.events if event.what != "log").replace(self.root, "")
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

    # What calls report.

    def sent(self, call: "Call", message: object, wire: bytes) -> None:
        """A client sends."""
        if call.method == "Upload":
            if call not in self.uploads and (begin := _begin(wire)) is not None:
                self.uploads[call] = Upload(call.client.name, begin)
                self.note(
                    "upload",
                    run=begin.run_id,
                    round=begin.round,
                    digest=begin.manifest.digest.hex(),
                    order=begin.order_id,
                )
                self.reached("upload.begin")
            else:
                self._chunk(call, wire)
                self.reached("upload.chunk")
        elif call.method == "Attach" and isinstance(message, federation_pb2.AttachRequest):
            if message.WhichOneof("kind") == "hello":
                self.note("hello", held=list(message.hello.held_orders))
            elif message.WhichOneof("kind") == "answer":
                self.note("answer", order=message.answer.order_id, outcome=message.answer.WhichOneof("outcome"))
        else:
            self.note("call", method=call.method)

    def received(self, call: "Call", message: object) -> None:
        """A client receives."""
        who = call.client.name
        match message:
            case federation_pb2.AttachResponse():
                self._attach_response(who, message)
            case federation_pb2.UploadResponse():
                self._upload_response(call, message, "")
            case control_pb2.WatchRunResponse() if message.HasField("commit"):
                self.commit_seen(who, call, message.commit)
            case _:
                pass

    def answered(self, call: "Call", message: object) -> None:
        """The server sends."""
        if isinstance(message, federation_pb2.UploadResponse):
            self._upload_response(call, message, "send-")

    def consumed(self, call: "Call", wire: bytes) -> None:
        """The server has dealt with a message of a call's client and asks for the next one."""
        if call.method != "Upload" or (upload := self.uploads.get(call)) is None:
            return
        try:
            piece = parse_upload(wire)
        except FsllmError:
            return
        if isinstance(piece, Piece):
            digest = upload.begin.manifest.digest
            before = self.held.get(upload.key, (b"", 0))
            reached = before[1] if before[0] == digest else 0
            self.held[upload.key] = digest, max(reached, piece.offset + len(piece.data))

    def server_died(self, *, power: bool) -> None:
        """What was in its page cache is in danger."""
        self.ready.clear()
        if power:
            self.held.clear()

    def ended(self, call: "Call", code: grpc.StatusCode, trailing: tuple[tuple[str, bytes], ...]) -> None:
        """The server ends a call."""
        self.ready.pop(call, None)
        reason = _reason(code, trailing)
        if reason and (upload := self.uploads.get(call)) is not None:
            begin = upload.begin
            self.note(
                "refuse",
                who="server",
                member=upload.member,
                run=begin.run_id,
                round=begin.round,
                digest=begin.manifest.digest.hex(),
                reason=reason,
            )
            if reason in DROPPING:
                self.held.pop(upload.key, None)

    def outcome(self, call: "Call", error: FsllmError | None) -> None:
        """A call has ended for its client."""
        self.note("outcome", who=call.client.name, method=call.method, reason=error.reason if error else "OK")

    def commit_seen(self, who: str, call: "Call | None", commit: control_pb2.Commit) -> None:
        self.note(
            "commit",
            who=who,
            round=commit.round,
            digest=commit.version.digest.hex(),
            shares=tuple((c.member, c.digest.hex(), c.weight, c.examples, c.tokens) for c in commit.contributions),
        )

    def _chunk(self, call: "Call", wire: bytes) -> None:
        try:
            piece = parse_upload(wire)
        except FsllmError:
            piece = None
        if isinstance(piece, Piece) and call in self.uploads:
            begin = self.uploads[call].begin
            self.payloads.setdefault(begin.manifest.digest.hex(), {})[piece.offset] = bytes(piece.data)
            self.note("chunk", round=begin.round, offset=piece.offset, size=len(piece.data))
        else:
            self.note("chunk", size=len(wire))

    def _attach_response(self, who: str, message: federation_pb2.AttachResponse) -> None:
        match message.WhichOneof("kind"):
            case "order":
                order = message.order
                self.note(
                    "order",
                    who=who,
                    order=order.order_id,
                    kind=KINDS[order.kind],
                    round=order.round,
                    base=order.base.number if order.HasField("base") else None,
                    digest=order.base.digest.hex(),
                )
            case "withdraw":
                self.note("withdraw", who=who, order=message.withdraw.order_id, reason=message.withdraw.reason)
            case "welcome":
                self.note("welcome", who=who)

    def _upload_response(self, call: "Call", message: federation_pb2.UploadResponse, sending: str) -> None:
        upload = self.uploads.get(call)
        kind = message.WhichOneof("kind")
        if upload is None or kind is None:
            return
        who = "server" if sending else call.client.name
        begin = upload.begin
        facts: dict[str, Any] = {"member": upload.member, "run": begin.run_id, "round": begin.round}
        if kind == "ready":
            if sending:
                self.ready[call] = None
                facts["at_once"] = len(self.ready)
            digest, reached = self.held.get(upload.key, (b"", 0))
            facts["digest"] = begin.manifest.digest.hex()
            facts["offset"] = message.ready.offset
            facts["held"] = reached if digest == begin.manifest.digest else 0
        elif kind == "receipt":
            if sending:
                self.ready.pop(call, None)
            facts["digest"] = message.receipt.digest.hex()
            facts["duplicate"] = message.receipt.duplicate
        self.note(sending + kind, who=who, **facts)


def _begin(wire: bytes) -> federation_pb2.UploadBegin | None:
    try:
        message = parse_upload(wire)
    except FsllmError:
        return None
    return message if isinstance(message, federation_pb2.UploadBegin) else None


def _reason(code: grpc.StatusCode, trailing: tuple[tuple[str, bytes], ...]) -> str:
    if code is grpc.StatusCode.OK:
        return ""
    return error_from(grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(*trailing), "")).reason


def _short(value: object) -> str:
    if isinstance(value, str) and len(value) == 64:
        return value[:12]
    if isinstance(value, frozenset):
        value = sorted(value)
    if isinstance(value, tuple | list):
        return "[" + ",".join(map(_short, value)) + "]"
    return str(value)
