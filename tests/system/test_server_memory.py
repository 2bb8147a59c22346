"""A connection that has carried a payload keeps little of it: the server's memory does not grow with the sites."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from tests.system.harness import ServerProcess
from tests.system.peer import Peer, Tensors, join_all
from tests.system.runs import noop_plan, submit

from fsllm.v1 import federation_pb2 as pb

pytestmark = pytest.mark.slow

MIB = 1 << 20
SITES = 32
FIRST = 4
"""Sites after which the server has what it needs for transfers: its heaps do not shrink."""
A_SITE = 300_000
"""Bytes: a read buffer of 64 KiB, and what a connection's calls leave behind."""


def test_a_site_that_has_sent_and_fetched_its_payload_costs_little(tmp_path: Path) -> None:
    with ServerProcess(tmp_path / "server") as server:
        process = psutil.Process(server.process.pid)
        peers = [Peer(server, server.enroll(f"site-{number:02}")) for number in range(SITES)]
        run = submit(server, noop_plan(*(peer.name for peer in peers)))
        orders = join_all(peers, Tensors.make(tmp_path, 0.5, elements=8 * MIB // 4))
        update = Tensors.make(tmp_path, 0.25, elements=8 * MIB // 4)

        def growth(transfer: Callable[[Peer, pb.Order], Any]) -> float:
            """Return the bytes of memory that each site costs, once the first have done it."""
            # Without the last, so that the round stays open.
            pairs = list(zip(peers, orders, strict=True))[:-1]
            for pair in pairs[:FIRST]:
                transfer(*pair)
            before = process.memory_info().rss
            for pair in pairs[FIRST:]:
                transfer(*pair)
            return (process.memory_info().rss - before) / len(pairs[FIRST:])

        assert growth(lambda peer, order: peer.download(order.base, run)) < A_SITE
        assert growth(lambda peer, order: peer.deliver(order, update)) < A_SITE
