"""What the tests of faults share: a real server and real sites, each behind a proxy of its own."""

import json
import re
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
from tests.fault.proxy import Fault, Proxy
from tests.system.harness import ServerProcess
from tests.system.runs import await_done, expected, final, plan_for, submit
from tests.system.site_process import SiteProcess

from fsllm.v1 import control_pb2 as control
from fsllm_common.tensors.chunks import CHUNK

MIB: Final = 2**20
KEEPALIVE: Final = ("--keepalive-seconds", "2")
"""So that a test of silence takes seconds."""


@dataclass
class Federation:
    """A server, and sites that reach it through proxies only."""

    server: ServerProcess
    sites: tuple[SiteProcess, ...]
    proxies: tuple[Proxy, ...]
    seeds: dict[str, int] = field(default_factory=dict)
    """By run. Each has its own: a version that a site has seen in another run is not downloaded again."""

    def inflict(self, fault: Fault) -> None:
        """Inflict a fault on every connection, and those to come."""
        for proxy in self.proxies:
            proxy.inflict(fault)

    def inflict_live(self, fault: Fault) -> None:
        """Inflict a fault on the connections of now."""
        for proxy in self.proxies:
            assert proxy.inflict_live(fault)

    def heal(self) -> None:
        """Inflict nothing any more."""
        for proxy in self.proxies:
            proxy.heal()

    def connections(self) -> int:
        """Return how many connections there have been."""
        return sum(len(proxy.connections) for proxy in self.proxies)

    def submit(self, mebibytes: float = 6, **keys: object) -> str:
        """Start a run of all sites that trains nothing."""
        tensors = {"tensors": 5, "mebibytes": mebibytes}
        algorithm = {"name": "noop", "weighting": "uniform", "synthetic": tensors}
        seed = len(self.seeds) + 1
        run = submit(self.server, plan_for(*self.sites, **{"algorithm": algorithm, "seed": seed, "rounds": 2, **keys}))
        self.seeds[run] = seed
        return run

    def finish(self, run: str, rounds: int = 2, mebibytes: float = 6) -> control.Run:
        """Wait for a run's end and compare the result with its closed form."""
        done = await_done(self.server, run)
        result = expected(self.sites, rounds, self.seeds[run], mebibytes)
        np.testing.assert_allclose(final(self.server, run), result, rtol=0, atol=2e-6)
        for commit in done.commits[1:]:
            assert [one.member for one in commit.contributions] == sorted(site.name for site in self.sites)
        return done


@contextmanager
def federation(folder: Path, data: Path, sites: int = 2, *, sites_folder: Path | None = None) -> Iterator[Federation]:
    """Start a server and sites behind proxies, all attached.

    Args:
        folder: Of everything.
        data: The sites' rows.
        sites: How many.
        sites_folder: Of the sites' states, if it is another.

    """
    with ExitStack() as stack:
        server = stack.enter_context(ServerProcess(folder / "server", *KEEPALIVE))
        proxies = tuple(stack.enter_context(Proxy(("127.0.0.1", server.port))) for _ in range(sites))
        states = sites_folder or folder
        running = tuple(
            stack.enter_context(SiteProcess(server, states / f"site-{at}", data, "--server", proxy.address, *KEEPALIVE))
            for at, proxy in enumerate(proxies)
        )
        for site in running:
            site.await_log("attached")
        yield Federation(server, running, proxies)


def metric(server: ServerProcess, name: str) -> float:
    """Return a metric of the server, summed over its labels."""
    with urllib.request.urlopen(f"{server.metrics_url}/metrics", timeout=10) as page:  # noqa: S310 - http
        text = page.read().decode()
    return sum(float(value) for value in re.findall(rf"^{name}(?:{{.*}})? (\S+)$", text, re.MULTILINE))


def lines(log: str, event: str, **fields: object) -> list[dict[str, Any]]:
    """Return the lines of a log about an event that have these fields."""
    found = [json.loads(line) for line in log.splitlines() if line.startswith("{") and f'"{event}"' in line]
    return [
        line
        for line in found
        if line["event"] == event and all(line.get(name) == value for name, value in fields.items())
    ]


@dataclass(frozen=True)
class Sent:
    """What the uploads of a run have cost."""

    received: int
    resumed: list[int]
    """The offsets at which the server told sites to go on, where they were not 0."""


@contextmanager
def counted(federation: Federation) -> Iterator[list[Sent]]:
    """Count what the server receives inside; the list has the answer afterwards. The server must not restart."""
    name = "fsllm_server_received_bytes_total"
    before, told = metric(federation.server, name), len(lines(federation.server.log, "receiving"))
    answer: list[Sent] = []
    yield answer
    offsets = [line["at_byte"] for line in lines(federation.server.log, "receiving")[told:]]
    received = round(metric(federation.server, name) - before)
    answer.append(Sent(received, [offset for offset in offsets if offset]))


def window(payloads: Sequence[int], interruptions: int) -> range:
    """Return how many bytes the server may take in for these payloads: at most a chunk twice an interruption."""
    return range(sum(payloads), sum(payloads) + interruptions * CHUNK + 1)
