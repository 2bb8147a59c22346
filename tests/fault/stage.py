"""Runs brought to every state that a run can be in, at once, on one real server, and left there.

anna and bert are the sites of every run; carl is a site of none; eve is an evaluator; opal an operator; rita a site
that was revoked. anna comes first in every alphabet: she builds version 0, and delivers first.
"""

import json
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO
from uuid import uuid4

import grpc
from tests.system.harness import CALL_SECONDS, ServerProcess, reason_of
from tests.system.peer import Peer, Tensors

from fsllm.v1 import control_pb2 as control
from fsllm.v1 import federation_pb2 as pb

STATES = (
    "none",  # there is no such run
    "gathering",  # submitted; bert has not answered JOIN
    "building",  # anna is asked to build version 0
    "checking",  # she has; bert is asked to check it
    "collecting",  # both are asked to train
    "delivered",  # anna has delivered, bert has not
    "reducing",  # both have, and the sum is being made
    "evaluating",  # both are asked to evaluate it
    "paused",  # while both were training
    "done",
    "cancelled",  # while both were training
)


class HeldServer(ServerProcess):
    """A server whose reductions can be held."""

    module = "tests.fault.held_server"


class Stage:
    """One server with a run in each state."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self._folder = folder
        self._pipe = folder / "hold"
        root = Path(__file__).parents[2]
        environment = {"FSLLM_TEST_HOLD": str(self._pipe), "PYTHONPATH": str(root)}
        self.server = HeldServer(folder / "server", *arguments, environment=environment)
        self.zero = Tensors.make(folder, 0.5, elements=3000, config='{"peft_type": "LORA"}')
        self.delta = Tensors.make(folder, 1.0, elements=3000)
        self.other = Tensors.make(folder, 2.0, elements=3000)
        self.runs: dict[str, str] = {"none": "0" * 12}
        self.orders: dict[str, dict[str, pb.Order]] = {state: {} for state in STATES}
        """The last order that each of anna and bert got in each run; open in those states that say so."""
        self._hold: BinaryIO | None = None

    @contextmanager
    def open(self) -> Iterator["Stage"]:
        """Start the server and bring the runs to their states."""
        with self.server:
            self.credentials = {name: self.server.enroll(name) for name in ("anna", "bert", "carl", "rita")}
            self.credentials["eve"] = self.server.enroll("eve", "evaluator")
            self.credentials["opal"] = self.server.enroll("opal", "operator")
            self.channels = {name: self.server.channel(one) for name, one in self.credentials.items()}
            revoke = control.RevokeMemberRequest(name="rita")
            self.server.control().RevokeMember(revoke, timeout=CALL_SECONDS)
            self.anna, self.bert = (Peer(self.server, self.credentials[name]) for name in ("anna", "bert"))
            for peer in (self.anna, self.bert):
                peer.attach()
            for state in STATES[1:]:
                if state != "reducing":
                    self._bring(state)
            self._bring("reducing")
            yield self
            if self._hold is not None:
                self.release()

    def _bring(self, state: str) -> None:
        """Submit a run and lead it to ``state``."""
        plan = {
            "name": state,
            "rounds": 1,
            "model": {"name": "embedded"},
            "algorithm": {"name": "fedavg"},
            "cohort": {"quorum": 2, "sites": ["anna", "bert"]},
            "timing": {"gather_seconds": 0.01, "idle_seconds": 3600},
            "wire": {"element_type": "fp32"},
            "evaluate": {"every": int(state == "evaluating"), "base": False},
        }
        request = control.SubmitRunRequest(plan=json.dumps(plan).encode(), request_id=uuid4().hex)
        run = self.server.control().SubmitRun(request, timeout=CALL_SECONDS).run.run_id
        self.runs[state] = run
        anna, bert = (self._lead(state, peer) for peer in (self.anna, self.bert))
        # Each step is taken up to the state that is wanted.
        next(anna), next(bert)
        if state == "gathering":
            return
        next(bert)
        next(anna)
        if state == "building":
            return
        next(anna)
        next(bert)
        if state == "checking":
            return
        next(bert)
        next(anna)
        call = {"paused": "PauseRun", "cancelled": "CancelRun"}.get(state)
        if call is not None:
            request_type: Any = getattr(control, f"{call}Request")
            getattr(self.server.control(), call)(request_type(run_id=run), timeout=CALL_SECONDS)
        if state in ("collecting", "paused", "cancelled"):
            return
        next(anna)
        if state == "delivered":
            return
        if state == "reducing":
            os.mkfifo(self._pipe)
        next(bert)
        if state == "reducing":
            self._hold = self._pipe.open("wb")  # returns when the reduction has begun to wait
        elif state == "evaluating":
            self._take(state, self.anna), self._take(state, self.bert)
        else:
            self.await_event(run, "status", "done")

    def _lead(self, state: str, peer: Peer) -> Iterator[None]:
        """Do what a site does, a step at each ``next``."""
        order = self._take(state, peer)
        if peer is self.anna:
            peer.answer(order, done=pb.Done())  # JOIN
            yield
            order = self._take(state, peer)
            yield
            peer.deliver(order, self.zero)  # BUILD
            yield
        else:
            yield
            peer.answer(order, done=pb.Done())  # JOIN
            yield
            order = self._take(state, peer)
            yield
            peer.answer(order, done=pb.Done())  # CHECK
            order = self._take(state, peer)
            yield
            peer.deliver(order, self.delta)  # TRAIN
            yield
            return
        order = self._take(state, peer)
        yield
        peer.deliver(order, self.delta)  # TRAIN
        yield

    def _take(self, state: str, peer: Peer) -> pb.Order:
        order = peer.order()
        assert order.run_id == self.runs[state]
        self.orders[state][peer.name] = order
        return order

    def release(self) -> None:
        """Let the reduction go on."""
        assert self._hold is not None
        self._pipe.unlink()
        self._hold.close()
        self._hold = None

    def finish(self, state: str) -> control.Run:
        """Lead the run of a state to its end, from where it stands, and return it."""
        run = self.runs[state]
        if state == "paused":
            self.server.control().ResumeRun(control.ResumeRunRequest(run_id=run), timeout=CALL_SECONDS)
        steps = {
            "gathering": "bert.join anna.build bert.check anna.train bert.train",
            "building": "anna.build* bert.check anna.train bert.train",
            "checking": "bert.check* anna.train bert.train",
            "collecting": "anna.train* bert.train*",
            "delivered": "bert.train*",
            "evaluating": "anna.evaluate* bert.evaluate*",
            "paused": "anna.train bert.train",
        }.get(state, "")
        for step in steps.split():  # an asterisk: the order is in hand
            name, _, kind = step.rstrip("*").partition(".")
            peer = self.anna if name == "anna" else self.bert
            in_hand = step.endswith("*") or kind == "join"
            order = self.orders[state][name] if in_hand else self._take(state, peer)
            if kind in ("build", "train"):
                peer.deliver(order, self.zero if kind == "build" else self.delta)
            else:
                peer.answer(order, done=pb.Done())
        self.await_event(run, "status", "cancelled" if state == "cancelled" else "done")
        return self.run(state)

    def await_event(self, run: str, kind: str, subject: str) -> None:
        """Wait until something has happened to a run."""
        watch = self.server.control().WatchRun(control.WatchRunRequest(run_id=run), timeout=CALL_SECONDS)
        assert any((event.kind, event.subject) == (kind, subject) for event in watch)
        watch.cancel()

    def run(self, state: str) -> control.Run:
        """Return everything that operators see of a run."""
        request = control.GetRunRequest(run_id=self.runs[state])
        return self.server.control().GetRun(request, timeout=CALL_SECONDS).run

    def log_of(self, state: str) -> list[tuple[Any, ...]]:
        """Return the run's events as they lie in the server's database."""
        with sqlite3.connect(f"file:{self.server.state / 'fsllm.sqlite3'}?mode=ro", uri=True) as database:
            query = "select sequence, kind, body from events where run_id = ? order by sequence"
            return database.execute(query, (self.runs[state],)).fetchall()


def outcome(channel: grpc.Channel, method: str, *requests: bytes) -> str:
    """Make a call of ``/fsllm.v1.<method>`` in raw bytes: "ok" or the kind of its first response, or why it failed."""
    service, _, name = method.partition("/")
    pool = {"Federation": pb, "Control": control}[service]
    descriptor = pool.DESCRIPTOR.services_by_name[f"{service}Service"].methods_by_name[name]
    ends = [("unary", "stream")[streams] for streams in (descriptor.client_streaming, descriptor.server_streaming)]
    make = getattr(channel, "_".join(ends))
    call = make(f"/fsllm.v1.{service}Service/{name}", request_serializer=None, response_deserializer=None)
    try:
        answer = call(iter(requests) if descriptor.client_streaming else requests[0], timeout=CALL_SECONDS)
        if descriptor.server_streaming:
            first = next(answer, b"")
            answer.cancel()
        else:
            first = answer
    except grpc.RpcError as error:
        return reason_of(error)
    response = getattr(pool, descriptor.output_type.name).FromString(first)
    if descriptor.server_streaming and descriptor.output_type.oneofs:
        return response.WhichOneof("kind") or "ok"
    return "ok"
