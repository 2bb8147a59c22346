"""Clocks that jump, by libfaketime: certificates notice, and no work is ended or kept waiting by it."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.fault.federation import MIB, Federation, federation, lines
from tests.fault.proxy import Fault
from tests.system.runs import events, until
from tests.system.site_process import SiteProcess

LIBRARY = next(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"), None)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(LIBRARY is None, reason="libfaketime is not installed (Debian: faketime)"),
]


class Clock:
    """The clock of processes that are started with ``environment``: the host's, less or more what it is set to.

    Only the time of day jumps. The monotonic clock does not, as on a host whose clock is set.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.set("+0")
        self.environment = {
            "LD_PRELOAD": str(LIBRARY),
            "FAKETIME_TIMESTAMP_FILE": str(path),
            "FAKETIME_NO_CACHE": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            "DONT_FAKE_MONOTONIC": "1",
        }

    def set(self, offset: str) -> None:
        """Jump: +3h, -2d, +0."""
        fresh = self._path.with_suffix(".new")
        fresh.write_text(offset)
        os.replace(fresh, self._path)


@pytest.fixture(scope="module")
def clock(tmp_path_factory: pytest.TempPathFactory) -> Clock:
    return Clock(tmp_path_factory.mktemp("clock") / "offset")


@pytest.fixture(autouse=True)
def _right(running: Federation, clock: Clock) -> Iterator[None]:
    yield
    clock.set("+0")
    running.heal()


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory, clock: Clock) -> Iterator[Federation]:
    """The server's clock and the first site's jump together; the second site's is right."""
    folder = tmp_path_factory.mktemp("fsllm")
    data = folder / "rows.jsonl"
    data.write_text('{"prompt": "a", "completion": "b"}\n')
    with federation(folder, data) as found:
        for process in (found.server, found.sites[0]):
            process.kill()
            process.environment = clock.environment
        found.server.restart()
        found.sites[0].start()
        for site in found.sites:
            site.await_log("attached", 2)
        yield found


@pytest.mark.parametrize("jump", ["+7h", "-7h"])
def test_a_jump_of_hours_in_a_round_neither_ends_nor_hangs_it(jump: str, running: Federation, clock: Clock) -> None:
    """Certificates live for a day here, so they hold; every deadline of the plan is shorter than the jump."""
    timing = {"gather_seconds": 0.01, "collect_seconds": 600, "idle_seconds": 60, "recruit_seconds": 600}
    detached = len(lines(running.server.log, "detached"))
    for proxy in running.proxies:
        proxy.inflict(Fault(bytes_per_second=8 * MIB))
    told = [len(lines(site.log, "delivered", round=2)) for site in running.sites]
    run = running.submit(timing=timing)
    until(running.server, run, "commit", "0")
    clock.set(jump)
    # To a server that far behind every new connection's certificate is of the future; those that there are go on.
    for site, before in zip(running.sites, told, strict=True):
        while len(lines(site.log, "delivered", round=2)) == before:
            site.await_log("delivered", len(lines(site.log, "delivered")) + 1)
    clock.set("+0")
    running.finish(run)
    assert not lines(running.server.log, "detached")[detached:]


def test_a_deadline_is_kept_though_the_clock_goes_back(running: Federation, clock: Clock) -> None:
    """A round of one of two sites ends by its deadline, measured by the monotonic clock."""
    names = sorted(site.name for site in running.sites)
    timing = {"gather_seconds": 0.01, "collect_seconds": 2.0}
    run = running.submit(rounds=1, timing=timing, cohort={"quorum": 1, "sites": names})
    told = events(running.server, run)
    next(event for event in told if event.kind == "commit")
    running.proxies[1].inflict(Fault(black_hole=True))
    clock.set("-7h")
    assert next(event for event in told if event.kind == "commit").round == 1


def test_a_site_whose_clock_is_wrong_is_told_so(running: Federation, tmp_path: Path) -> None:
    """A day of certificates: two days ahead they have all expired, two days back none is valid yet."""
    site = running.sites[0]
    for offset, words in (("+2d", "expired at"), ("-2d", "is valid from")):
        wrong = Clock(tmp_path / f"wrong{offset}")
        wrong.set(offset)
        site.kill()
        site.environment = wrong.environment
        before = len(site.log)
        site.start()
        assert site.wait() == 6
        told = site.log[before:]
        assert words in told
        assert "Traceback" not in told


def test_a_running_site_lives_through_a_jump_that_ends_its_certificate_and_back(
    running: Federation, tmp_path: Path
) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text('{"prompt": "a", "completion": "b"}\n')
    clock = Clock(tmp_path / "offset")
    site = SiteProcess(running.server, tmp_path / "jumper", data)
    site.environment = clock.environment
    with site:
        site.await_log("attached")
        clock.set("+2d")
        running.server.kill()  # so that it has to attach again, and looks at its certificate
        running.server.restart()
        assert site.wait() == 6
        assert "CERTIFICATE_EXPIRED" in site.log
        # The clock is mended: it goes on with what it has.
        clock.set("+0")
        site.start()
        site.await_log("attached", 2)
