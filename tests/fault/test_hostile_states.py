"""Every rpc, from every kind of caller, in every state of a run: docs/states.md says what is answered, and is right.

Besides, a call leaves the run's log as it was, to the byte, and the others' work goes on.
"""

from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from tests.fault.messages import GARBAGE, MESSAGES
from tests.fault.stage import STATES, Stage, outcome
from tests.system.harness import CALL_SECONDS, reason_of
from tests.system.peer import Peer

from fsllm.v1 import control_pb2 as control
from fsllm.v1 import federation_pb2 as pb
from fsllm.v1.control_pb2 import InviteResponse
from fsllm_common.errors import REASONS

pytestmark = pytest.mark.slow

DOCS = Path(__file__).parents[2] / "docs" / "states.md"


def table(heading: str, keys: int) -> dict[tuple[str, ...], dict[str, str]]:
    """Read a table of the document: cells by row (its first ``keys`` cells) and column."""
    section = DOCS.read_text().partition(f"## {heading}\n")[2].partition("\n## ")[0]
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in section.splitlines() if line.startswith("|")]
    head, _, *rows = lines
    return {tuple(row[:keys]): dict(zip(head[keys:], row[keys:], strict=True)) for row in rows}


BY_STATE = table("What depends on the run's state", 2)
BY_CALLER = table("What is the same in every state", 1)


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    # Hundreds of refusals a second are what the quotas are there for; they have tests of their own.
    with Stage(
        tmp_path_factory.mktemp("stage"), "--calls-per-minute", "100000000", "--uploads-at-once", "64"
    ).open() as stage:
        yield stage


def test_the_tables_know_every_rpc_state_and_reason() -> None:
    services = (
        pb.DESCRIPTOR.services_by_name["FederationService"],
        control.DESCRIPTOR.services_by_name["ControlService"],
    )
    rpcs = {method.name for service in services for method in service.methods}
    assert {name.split()[0] for (name,) in BY_CALLER} == rpcs
    assert tuple(next(iter(BY_STATE.values()))) == STATES
    cells = {cell for row in (*BY_STATE.values(), *BY_CALLER.values()) for cell in row.values()}
    assert {cell for cell in cells if cell.isupper()} <= REASONS.keys() - {"INTERNAL"}


@pytest.mark.parametrize("state", STATES)
def test_by_state(stage: Stage, state: str) -> None:
    seen, expected = {}, {}
    before = stage.log_of(state)
    for (caller, message), cells in BY_STATE.items():
        if cells[state] != "acts":
            method, make = MESSAGES[message]
            expected[caller, message] = cells[state]
            seen[caller, message] = outcome(stage.channels[caller], method, *make(stage, state))
    assert seen == expected
    assert stage.log_of(state) == before


@pytest.mark.parametrize("state", STATES)
def test_by_caller(stage: Stage, state: str) -> None:
    seen, expected = {}, {}
    before = stage.log_of(state)
    for (message,), cells in BY_CALLER.items():
        method, make = MESSAGES[message]
        for caller, cell in cells.items():
            if cell != "-":
                expected[message, caller] = cell
                seen[message, caller] = outcome(stage.channels[caller], method, *make(stage, state))
    assert seen == expected
    assert stage.log_of(state) == before


@pytest.mark.parametrize("state", STATES[1:])
def test_what_an_attached_site_says_of_anothers_order_is_passed_over(stage: Stage, state: str) -> None:
    """On anna's own stream, whose order of the run stays open: ``test_the_others_work_goes_on`` answers it."""
    bert = stage.orders[state]["bert"].order_id
    for request in (
        pb.AttachRequest(answer=pb.Answer(order_id=bert, accepted=pb.Accepted())),
        pb.AttachRequest(answer=pb.Answer(order_id=bert, done=pb.Done())),
        pb.AttachRequest(answer=pb.Answer(order_id=bert, failed=pb.Failed(reason="WORKER_DIED"))),
        pb.AttachRequest(answer=pb.Answer(order_id=bert, declined=pb.Declined(reason="POLICY_REFUSED"))),
        pb.AttachRequest(answer=pb.Answer(order_id="made.up", done=pb.Done())),
        pb.AttachRequest(progress=pb.Progress(order_id=bert, activity="training", done=1, total=2)),
        pb.AttachRequest(progress=pb.Progress(order_id="", activity="")),
        pb.AttachRequest(heartbeat=pb.Heartbeat()),
    ):
        assert stage.anna.stream is not None
        stage.anna.stream.put(request)


def test_who_enrols_and_attaches_changes_no_run_whatever_its_state(stage: Stage) -> None:
    """Neither knows of runs, so that one call is made beside a run in each state."""
    before = {state: stage.log_of(state) for state in STATES}
    invitation = stage.server.invite("dora")
    unknown = InviteResponse.FromString(invitation.SerializeToString())
    unknown.token = f"{invitation.token.partition('.')[0]}.{'0' * 43}"
    with pytest.raises(grpc.RpcError) as error:
        stage.server.redeem(unknown)
    assert reason_of(error.value) == "JOIN_TOKEN_UNKNOWN"
    dora = Peer(stage.server, stage.server.redeem(invitation))
    dora.attach()
    with pytest.raises(grpc.RpcError) as error:
        stage.server.redeem(invitation)
    assert reason_of(error.value) == "JOIN_TOKEN_USED"
    dora.close()
    assert {state: stage.log_of(state) for state in STATES} == before


@pytest.mark.parametrize("request_", [b"", GARBAGE, pb.AttachRequest(hello=pb.Hello(protocol_version=1))])
def test_an_attached_site_that_breaks_the_rules_is_detached(stage: Stage, request_: bytes | pb.AttachRequest) -> None:
    wire = request_ if isinstance(request_, bytes) else request_.SerializeToString()
    hello = pb.AttachRequest(hello=pb.Hello(protocol_version=1)).SerializeToString()
    attach = stage.channels["carl"].stream_stream(
        "/fsllm.v1.FederationService/Attach",
        request_serializer=None,
        response_deserializer=pb.AttachResponse.FromString,
    )
    said = []
    before = {state: stage.log_of(state) for state in STATES}
    with pytest.raises(grpc.RpcError) as error:
        said.extend(attach(iter([hello, wire]), timeout=CALL_SECONDS))
    assert reason_of(error.value) == ("MESSAGE_INVALID" if wire is GARBAGE else "HELLO_EXPECTED")
    assert [one.WhichOneof("kind") for one in said] in ([], ["welcome"])
    assert {state: stage.log_of(state) for state in STATES} == before


def test_the_others_work_goes_on(stage: Stage) -> None:
    """After all of the above each run ends as it would have, with the version that an undisturbed run has."""
    stage.release()
    ended = {state: stage.finish(state) for state in STATES[1:]}
    assert {state for state, run in ended.items() if run.status == control.RUN_STATUS_DONE} == set(STATES[1:-1])
    digests = {run.commits[-1].version.digest for state, run in ended.items() if state != "cancelled"}
    assert len(digests) == 1
    contributions = {(c.member, c.digest) for run in ended.values() for c in run.commits[-1].contributions}
    delta, zero = stage.delta.manifest.digest, stage.zero.manifest.digest
    assert contributions == {("anna", delta), ("bert", delta), ("anna", zero)}
    assert "failed by a bug" not in stage.server.log
