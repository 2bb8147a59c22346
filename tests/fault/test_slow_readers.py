"""Downloads take turns: a member that does not read holds one chunk, however many streams it opens."""

from pathlib import Path
from typing import Any

import pytest
from tests.system.harness import CALL_SECONDS, ServerProcess
from tests.system.peer import Peer, Tensors, join_all
from tests.system.runs import noop_plan, submit

from fsllm.v1 import federation_pb2 as pb

pytestmark = pytest.mark.slow

MIB = 1 << 20


def test_one_that_does_not_read_keeps_nobody_out(tmp_path: Path) -> None:
    with ServerProcess(tmp_path / "server", "--chunks-at-once", "2") as server:
        greedy, other = sorted((Peer(server, server.enroll(name)) for name in ("a", "b")), key=lambda peer: peer.name)
        run = submit(server, noop_plan(greedy.name, other.name))
        zero = Tensors.make(tmp_path, 0.5, elements=48 * MIB // 4)
        order, _ = join_all([greedy, other], zero)
        fetch: Any = greedy.channel.unary_stream(
            "/fsllm.v1.FederationService/Download",
            request_serializer=pb.DownloadRequest.SerializeToString,
            response_deserializer=None,
        )
        request = pb.DownloadRequest(run_id=run, digest=order.base.digest)
        calls = [fetch(request, timeout=10 * CALL_SECONDS) for _ in range(5)]
        next(calls[0])
        # Within the deadline of a call, which is shorter than what a transfer may stand still.
        assert other.download(order.base, run) == (zero.manifest, zero.payload)
        for call in calls:
            call.cancel()
