"""A site without its server: it goes on training, delivers when it is back, and trains nothing twice.

Real training of the embedded model; and processes that are stopped for a while (SIGSTOP).
"""

import json
import signal
from collections.abc import Iterator

import pytest
from tests.fault.federation import Federation, federation, lines
from tests.fault.plans import rows, train_plan
from tests.fault.proxy import Fault
from tests.system.runs import await_done, events, submit, until

pytestmark = pytest.mark.slow

MADE = "made, and kept until it is acknowledged"


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    folder = tmp_path_factory.mktemp("fsllm")
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows(0)))
    with federation(folder, data) as found:
        yield found


def test_a_site_that_is_cut_off_while_it_trains(running: Federation) -> None:
    site, proxy = running.sites[0], running.proxies[0]
    plan = train_plan(sorted(site.name for site in running.sites), 2)
    run = submit(running.server, {**plan, "train": {**plan["train"], "steps": 30}})
    next(e for e in events(running.server, run) if e.subject == site.name and e.progress.activity == "training")
    # Nothing goes through, for as long as the training takes.
    proxy.inflict(Fault(black_hole=True))
    made = site.await_log(MADE, 1 if lines(site.log, MADE, round=1) else 2)
    assert made["round"] == 1
    assert not lines(running.server.log, f"{site.name} has delivered its update", round=1)
    proxy.heal()
    done = await_done(running.server, run)
    for commit in done.commits[1:]:
        assert [one.member for one in commit.contributions] == sorted(site.name for site in running.sites)
    trained = [(line["run"], line["round"]) for line in lines(site.log, MADE, order="train")]
    assert trained == [(run, 1), (run, 2)]
    assert not lines(site.log, "order withdrawn")


@pytest.mark.parametrize("whom", ["server", "site"])
def test_a_process_that_is_stopped_for_longer_than_the_keepalive(whom: str, running: Federation) -> None:
    """The others notice its silence; it comes back, and the run ends as if nothing had been."""
    process = running.server if whom == "server" else running.sites[0]
    other = running.sites[1]
    run = running.submit(rounds=6)
    until(running.server, run, "commit", "1")
    before = len(lines(other.log, "not attached; trying again"))
    process.process.send_signal(signal.SIGSTOP)
    try:
        if whom == "server":
            other.await_log("not attached; trying again", before + 1)
        else:
            next(e for e in events(running.server, run) if e.message == f"{running.sites[0].name} is detached")
    finally:
        process.process.send_signal(signal.SIGCONT)
    running.finish(run, rounds=6)
