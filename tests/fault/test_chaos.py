"""A short kill loop; `make chaos` is the long one."""

import json
from pathlib import Path

import pytest
from tests.fault.chaos import MIB, Report, as_json, play
from tests.fault.chaos_checks import Observed, check_uploads
from tests.fault.plans import noop_plan
from tests.fault.proxy import Fault

pytestmark = pytest.mark.slow

SITES = ["site-0", "site-1", "site-2"]


def test_a_federation_that_is_killed_over_and_over_gives_the_same_bits(tmp_path: Path) -> None:
    report = Report(seed=1, folder=str(tmp_path))
    play(tmp_path / "chaos", report, noop_plan(SITES, 8, 4.0), 10, fault=Fault(bytes_per_second=24 * MIB))
    assert report.wrong == []
    assert report.kills >= 10
    assert report.rounds >= 8


def test_the_report_is_json() -> None:
    report = Report(seed=1, folder="f", wrong=["w"])
    report.strikes["kill -9 site"] += 2
    report.points["spool.sync"] += 1
    said = json.loads(as_json(report))
    assert (said["kills"], said["points"], said["wrong"]) == (2, {"spool.sync": 1}, ["w"])


def test_an_upload_that_begins_again_is_found() -> None:
    """The checker itself: an offset lower than one that the server has told or held."""

    def line(at: int) -> str:
        said = {"event": "receiving", "run": "r", "round": 1, "member": "a", "digest": "d", "at_byte": at, "of": 9}
        return json.dumps(said) + "\n"

    key = ("r", 1, "a", "d")
    assert check_uploads(line(0) + line(4) + line(4), []) == (2, [])
    assert len(check_uploads(line(4) + line(0), [])[1]) == 1
    log = line(0)
    assert check_uploads(log + line(6), [Observed({key: 6}, len(log))]) == (1, [])
    assert len(check_uploads(log + line(5), [Observed({key: 6}, len(log))])[1]) == 1
