"""`fsllm run verify` against a server that says all is well when it is not: what can be seen from outside is seen."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from control_harness import connected

from fsllm.v1 import control_pb2_grpc
from fsllm.v1.control_pb2 import (
    ROUND_VERDICT_BROKEN,
    ROUND_VERDICT_CHAIN_ONLY,
    ROUND_VERDICT_RECOMPUTED,
    Commit,
    Contribution,
    ListManifestsRequest,
    ListManifestsResponse,
    RoundFinding,
    RoundManifest,
    Run,
    VerifyProgress,
    VerifyRunRequest,
    VerifyRunResponse,
)
from fsllm.v1.federation_pb2 import Version
from fsllm_common.errors import FsllmError
from fsllm_common.round_manifest import FORMAT, digest, encode
from fsllm_operator.connection import Connection
from fsllm_operator.export import check_history
from fsllm_operator.verify import demand_sound, verify_run

ROUNDS = 4
UPDATE = {"member": "a", "digest": "aa" * 32, "examples": 3, "tokens": 5, "weight": 1 / 3}


def chain() -> list[RoundManifest]:
    out: list[RoundManifest] = []
    previous, base = None, None
    for number in range(ROUNDS):
        result = {"version": number, "published": f"{number + 1:064x}", "master": f"{number + 9:064x}"}
        manifest = {"format": FORMAT, "run": "r", "plan": "p", "round": number, "previous": previous}
        body = encode({**manifest, "base": base, "result": result, "updates": [UPDATE]})
        out.append(RoundManifest(round=number, body=body, digest=bytes.fromhex(digest(body))))
        previous, base = digest(body), result
    return out


class Server(control_pb2_grpc.ControlServiceServicer):
    """Says what a test wants it to say."""

    def __init__(self) -> None:
        self.manifests = chain()
        self.findings = [RoundFinding(manifest=one, verdict=ROUND_VERDICT_RECOMPUTED) for one in chain()]

    def ListManifests(  # noqa: N802 (the contract's name)
        self, request: ListManifestsRequest, context: grpc.ServicerContext
    ) -> Iterator[ListManifestsResponse]:
        for manifest in self.manifests:
            yield ListManifestsResponse(manifest=manifest)

    def VerifyRun(  # noqa: N802
        self, request: VerifyRunRequest, context: grpc.ServicerContext
    ) -> Iterator[VerifyRunResponse]:
        yield VerifyRunResponse(progress=VerifyProgress(round=0, done_bytes=1, total_bytes=2))
        for finding in self.findings:
            if not request.HasField("round") or finding.manifest.round == request.round:
                yield VerifyRunResponse(finding=finding)


@pytest.fixture
def server() -> Server:
    return Server()


@pytest.fixture
def connection(tmp_path: Path, server: Server) -> Iterator[Connection]:
    with connected(tmp_path, server) as connection:
        yield connection


def run() -> Run:
    commits = [
        Commit(
            round=number,
            version=Version(number=number, digest=bytes.fromhex(f"{number + 1:064x}")),
            contributions=[
                Contribution(member="a", digest=bytes.fromhex("aa" * 32), examples=3, tokens=5, weight=1 / 3)
            ],
        )
        for number in range(ROUNDS)
    ]
    return Run(run_id="r", name="ward", commits=commits)


def test_a_sound_run(connection: Connection, server: Server) -> None:
    told: list[VerifyProgress] = []
    found = verify_run(connection, run(), None, tell=told.append)
    assert [(one.round, one.verdict, one.problems) for one in found] == [(r, "recomputed", ()) for r in range(ROUNDS)]
    assert [one.manifest for one in found] == [one.digest.hex() for one in server.manifests]
    assert [(one.done_bytes, one.total_bytes) for one in told] == [(1, 2)]
    demand_sound(run(), found)
    server.findings[1].verdict = ROUND_VERDICT_CHAIN_ONLY
    server.findings[1].note = "not kept"
    (one,) = verify_run(connection, run(), 1, copy=chain())
    assert (one.round, one.verdict, one.note) == (1, "chain only", "not kept")
    demand_sound(run(), [one])


def forge(server: Server) -> None:
    """Change a weight, and give the manifest its new digest: the next one still names the old."""
    manifest = server.manifests[1]
    manifest.body = manifest.body.replace(b"0.3333333333333333", b"0.5")
    manifest.digest = bytes.fromhex(digest(manifest.body))
    server.findings[1].manifest.CopyFrom(manifest)


def shorten(server: Server) -> None:
    del server.manifests[2:]


def contradict(server: Server) -> None:
    server.findings[2].manifest.digest = b"\1" * 32


def keep_silent(server: Server) -> None:
    del server.findings[3]


def damage(server: Server) -> None:
    server.manifests[0].body = server.manifests[0].body.replace(b'"tokens":5', b'"tokens":6')


def confess(server: Server) -> None:
    server.findings[0].verdict = ROUND_VERDICT_BROKEN
    server.findings[0].problems.append("the upload of a is missing")


@pytest.mark.parametrize(
    ("lie", "broken", "words"),
    [
        (forge, [1, 2], "the run shows other updates or weights than the manifest"),
        (shorten, [2, 3], "the server has no manifest of this round"),
        (contradict, [2], "the server sends two manifests with different digests"),
        (keep_silent, [3], "the server says nothing about this round"),
        (damage, [0], "was recorded at the commit"),
        (confess, [0], "the upload of a is missing"),
    ],
)
def test_a_server_that_is_not_believed(
    connection: Connection, server: Server, lie: Callable[[Server], None], broken: list[int], words: str
) -> None:
    lie(server)
    found = verify_run(connection, run(), None)
    assert [one.round for one in found if one.verdict == "BROKEN"] == broken
    assert words in "; ".join(found[broken[0]].problems)
    with pytest.raises(FsllmError) as error:
        demand_sound(run(), found)
    assert error.value.reason == "ROUND_BROKEN"
    assert ", ".join(map(str, broken)) in error.value.message


def test_a_server_that_has_rewritten_everything_contradicts_an_earlier_copy(
    connection: Connection, server: Server
) -> None:
    copy = chain()
    known: dict[str, Any] = {"weight": UPDATE["weight"]}
    try:
        UPDATE["weight"] = 0.5
        server.manifests = chain()
        server.findings = [RoundFinding(manifest=one, verdict=ROUND_VERDICT_RECOMPUTED) for one in chain()]
    finally:
        UPDATE.update(known)
    shown = run()
    for commit in shown.commits:
        commit.contributions[0].weight = 0.5
    assert all(one.verdict == "recomputed" for one in verify_run(connection, shown, None))
    against = verify_run(connection, shown, None, copy=copy)
    assert [one.problems for one in against] == [("the manifest is another than in the copy",)] * ROUNDS


def test_a_server_that_has_lost_rounds(connection: Connection, server: Server) -> None:
    del server.manifests[3:], server.findings[3:]
    shown = run()
    del shown.commits[3:]
    found = verify_run(connection, shown, None, copy=chain())
    assert [(one.round, one.verdict) for one in found][-1] == (3, "BROKEN")
    assert found[-1].problems == ("the copy holds 4 rounds; the server has 3",)


def test_only_a_version_at_the_end_of_its_chain_is_exported() -> None:
    check_history(chain(), bytes.fromhex(f"{ROUNDS:064x}"))
    with pytest.raises(FsllmError) as other:
        check_history(chain(), b"\1" * 32)
    assert other.value.reason == "ROUND_BROKEN"
    broken = chain()
    broken[2].body = broken[2].body.replace(b'"examples":3', b'"examples":4')
    with pytest.raises(FsllmError, match="Round 2: ") as changed:
        check_history(broken, bytes.fromhex(f"{ROUNDS:064x}"))
    assert changed.value.reason == "ROUND_BROKEN"
