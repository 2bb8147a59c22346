"""A few hundred seeds of the deterministic simulation, and what makes it worth believing: it replays, it reaches every
failpoint, its disk forgets what was not synced."""

import gc
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from simulation import disk, run
from simulation.script import OWN_POINTS, SERVER_POINTS, SITE_POINTS, Arm, Rough

from fsllm_common import failpoints

SEEDS = 200
BATCH = 10
RUN = Path(__file__).parent / "simulation" / "run.py"


@pytest.fixture(autouse=True, scope="module")
def _light_collections() -> Iterator[None]:
    """Each seed ends with a garbage collection: let it not look at what other tests have loaded."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, SEEDS, BATCH))
def test_no_seed_breaks_a_promise(first: int) -> None:
    for seed in range(first, first + BATCH):
        outcome = run.play(seed)
        assert not outcome.violations, f"{sys.executable} {RUN} --seed {seed} --verbose"


@pytest.mark.slow
@pytest.mark.parametrize("rough", ["server", "sites", "liar"])
def test_no_rough_seed_breaks_a_promise(rough: Rough) -> None:
    for seed in range(3000, 3000 + BATCH):
        outcome = run.play(seed, rough=rough)
        assert not outcome.violations, f"{sys.executable} {RUN} --seed {seed} --rough {rough} --verbose"


@pytest.mark.slow
def test_a_seed_replays_exactly_in_another_process_with_other_hashes() -> None:
    def replay(hashes: str) -> list[str]:
        command = [sys.executable, str(RUN), "--first", "40", "--seeds", "8", "--processes", "1", "--histories"]
        done = subprocess.run(command, env={"PYTHONHASHSEED": hashes}, capture_output=True, text=True, check=True)
        return re.findall(r"seed \d+: history \w+", done.stdout)

    first = replay("0")
    assert len(set(first)) == 8
    assert replay("1") == first


@pytest.mark.slow
@pytest.mark.parametrize(
    ("whom", "point"), [*(("server", p) for p in SERVER_POINTS), *(("site-a", p) for p in dict.fromkeys(SITE_POINTS))]
)
def test_power_is_lost_at_every_failpoint_and_no_promise_broken(whom: str, point: str) -> None:
    for seed in range(1000, 1200):
        outcome = run.play(seed, arms=[Arm(whom, point, 1 + seed % 2, "power")])
        assert not outcome.violations, (seed, outcome.violations)
        if outcome.counts[f"power at {point}"]:
            return
    pytest.fail("it is never reached")


def test_all_failpoints_are_in_the_scripts() -> None:
    assert {*SERVER_POINTS, *SITE_POINTS} - OWN_POINTS == failpoints.NAMES


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> disk.Synced:
    known = disk.Synced()
    monkeypatch.setattr("os.fsync", known.sync)
    return known


def _sync(path: Path) -> None:
    import os

    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def _survivors(folder: Path, synced: disk.Synced, count: int = 40) -> list[dict[str, bytes]]:
    """Return what is left of a folder after so many power losses."""
    found = []
    for number in range(count):
        left = folder.with_name(f"{folder.name}-{number}")
        disk.after_power_loss(folder, left, synced, random.Random(number))  # noqa: S311
        found.append({str(p.relative_to(left)): p.read_bytes() for p in left.rglob("*") if p.is_file()})
    return found


def test_a_power_loss_spares_what_was_synced_and_only_that(tmp_path: Path, synced: disk.Synced) -> None:
    folder = tmp_path / "state"
    folder.mkdir()
    (folder / "kept").write_bytes(b"kept")
    _sync(folder / "kept")
    _sync(folder)
    (folder / "named").write_bytes(b"content that was synced, under a name that was not")
    _sync(folder / "named")
    (folder / "kept").write_bytes(b"KEPT, and more")
    left = _survivors(folder, synced)
    assert all("kept" in files for files in left)
    assert {b"kept", b"KEPT, and more"} < {files["kept"] for files in left}, "torn ones besides"
    assert {"named" in files for files in left} == {True, False}
    assert {files["named"] for files in left if "named" in files} == {(folder / "named").read_bytes()}


def test_a_rename_is_done_or_not(tmp_path: Path, synced: disk.Synced) -> None:
    folder = tmp_path / "state"
    folder.mkdir()
    for name, content in (("new", b"new"), ("file", b"old")):
        (folder / name).write_bytes(content)
        _sync(folder / name)
    _sync(folder)
    (folder / "new").rename(folder / "file")
    left = _survivors(folder, synced)
    assert {files["file"] for files in left} == {b"old", b"new"}
    assert all(b"new" in files.values() for files in left)


def test_a_kill_spares_everything_but_a_power_loss_after_it_does_not(tmp_path: Path, synced: disk.Synced) -> None:
    folder, copy = tmp_path / "state", tmp_path / "copy"
    folder.mkdir()
    (folder / "sub").mkdir()
    (folder / "sub" / "synced").write_bytes(b"synced")
    _sync(folder / "sub" / "synced")
    _sync(folder / "sub")
    _sync(folder)
    (folder / "sub" / "cached").write_bytes(b"cached")
    disk.after_kill(folder, copy, synced)
    assert (copy / "sub" / "cached").read_bytes() == b"cached"
    left = _survivors(copy, synced)
    assert all(files["sub/synced"] == b"synced" for files in left)
    assert not all("sub/cached" in files for files in left)
