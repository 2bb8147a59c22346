"""The operator's connection, to a server that a test makes up."""

from pathlib import Path

import grpc
from control_harness import connected

from fsllm.v1 import control_pb2_grpc
from fsllm.v1.control_pb2 import Commit, Contribution, GetRunRequest, GetRunResponse, Run


class Server(control_pb2_grpc.ControlServiceServicer):
    """Has one run, a long one."""

    def GetRun(self, request: GetRunRequest, context: grpc.ServicerContext) -> GetRunResponse:  # noqa: N802
        contributions = [Contribution(member=f"site-{at}", digest=bytes(32), weight=1 / 32) for at in range(32)]
        commits = [Commit(round=number, contributions=contributions) for number in range(4000)]
        return GetRunResponse(run=Run(run_id="r", commits=commits))


def test_a_run_of_thousands_of_rounds_is_shown(tmp_path: Path) -> None:
    with connected(tmp_path, Server()) as connection:
        answer = connection.call(connection.control.GetRun, GetRunRequest(run_id="r"))
    assert answer.ByteSize() > 4 * 1024 * 1024
    assert len(answer.run.commits) == 4000
