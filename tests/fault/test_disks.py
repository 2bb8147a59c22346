"""Disks that fail or are full in the middle of an upload, at either end: nothing is lost, nothing is said too early."""

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from tests.fault.federation import MIB, Federation, federation, lines
from tests.fault.proxy import Fault
from tests.system.harness import CALL_SECONDS
from tests.system.runs import events

from fsllm.v1 import control_pb2 as control
from fsllm_common.failpoints import VARIABLE

pytestmark = pytest.mark.slow

Disk = Callable[[str, int], Path]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n')
    return path


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    """Make small disks; given again, a name's disk gets another size."""
    mounted: set[Path] = set()

    def make(name: str, size: int) -> Path:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        option = f"remount,size={size}" if folder in mounted else f"size={size}"
        if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", option, "tmpfs", str(folder)]).returncode:
            pytest.skip("no small disk can be mounted here")
        mounted.add(folder)
        return folder

    yield make
    for folder in mounted:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(path: Path) -> None:
    """Write a file until its disk is full to the last page."""
    with path.open("wb", buffering=0) as file, suppress(OSError):
        while file.write(bytes(4096)):
            pass


def resume(running: Federation, run: str) -> None:
    running.server.control().ResumeRun(control.ResumeRunRequest(run_id=run), timeout=CALL_SECONDS)


def await_size(pattern: Callable[[], Iterator[Path]], size: int) -> None:
    """Return when one of these files has grown to ``size`` bytes: of its growing nobody tells."""
    ends = time.monotonic() + 60
    while not any(path.stat().st_size >= size for path in pattern() if path.exists()):
        assert time.monotonic() < ends
        time.sleep(0.01)


@pytest.mark.parametrize("end", ["server", "site"])
def test_a_disk_is_full_in_the_middle_of_a_payload(end: str, tmp_path: Path, data: Path, disk: Disk) -> None:
    """The server's in an upload, the site's in a download: the transfer waits, and goes on when there is space."""
    folder = disk("disk", 160 * MIB)
    server_folder, site_folder = (folder, tmp_path) if end == "server" else (tmp_path, folder)
    with federation(server_folder, data, 1, sites_folder=site_folder) as running:
        (site,), (proxy,) = running.sites, running.proxies
        proxy.inflict(Fault(bytes_per_second=4 * MIB))
        run = running.submit()
        if end == "server":
            await_size(lambda: (running.server.state / "spools").glob("*/*/*/*"), 2 * MIB)
        else:
            await_size(lambda: (site.state / "cache").glob("*.part"), 2 * MIB)
        fill(folder / "filler")
        what = "an upload" if end == "server" else "a download"
        # The first line may know only that the server has ended the call: gRPC was writing when the reason came.
        interruptions = (site.await_log(f"{what} was interrupted; trying again", times) for times in range(1, 9))
        told = next(line for line in interruptions if line["reason"] == "DISK_FULL")
        assert told["at_byte"] >= MIB
        (folder / "filler").unlink()
        proxy.heal()
        running.finish(run)
        if end == "server":
            resumed = lines(site.log, "sending", digest=lines(site.log, "sending")[0]["digest"])[-1]
            assert resumed["at_byte"] >= MIB


@pytest.mark.parametrize(
    "point",
    [
        "spool.sync=eio",
        "file.sync=eio@7",
        "event.append=eio@9",
        "event.append=enospc@3",
        "file.rename=enospc@7",
        "folder.sync=eio@12",
        "spool.drop=eio",
        "blob.sync=eio",
        "blob.rename=enospc",
    ],
)
def test_a_sync_that_fails_at_the_server(point: str, failing: Federation) -> None:
    """The next of its kind would succeed, whatever became of the bytes: they are written anew, or nothing is said."""
    server, before = failing.server, len(failing.server.log)
    server.kill()
    server.environment = {VARIABLE: point}
    server.restart()
    run = failing.submit(mebibytes=2.5)
    for event in events(server, run):
        if event.kind == "status" and event.subject == "paused":
            assert "Input/output error" in event.message or "No space left" in event.message
            resume(failing, run)
    failing.finish(run, mebibytes=2.5)
    if point.startswith("spool.sync"):
        # The whole payload had arrived; it was thrown away, sent again from the start, and acknowledged once.
        starts = [line["digest"] for line in lines(server.log[before:], "receiving", run=run, at_byte=0)]
        assert len(starts) == len(set(starts)) + 1
    assert "failed by a bug" not in server.log
    assert "Traceback" not in server.log


@pytest.fixture(scope="module")
def failing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    folder = tmp_path_factory.mktemp("fsllm")
    rows = folder / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n')
    with federation(folder, rows) as running:
        yield running


@pytest.mark.skipif(shutil.which("fiu-run") is None, reason="libfiu is not installed (Debian: fiu-utils)")
def test_syncs_that_fail_in_the_system_calls(failing: Federation, tmp_path: Path) -> None:
    """libfiu makes an fsync and an fdatasync fail, whoever calls them, in every round."""
    server, before = failing.server, len(failing.server.log)
    server.kill()
    library = next(Path("/usr/lib").rglob("fiu_posix_preload.so"))
    fifo = tmp_path / "fiu"
    preload = f"{library.with_name('fiu_run_preload.so')} {library}"
    server.environment = {"LD_PRELOAD": preload, "FIU_CTRL_FIFO": str(fifo)}
    server.restart()
    command = ["fiu-ctrl", "-f", str(fifo)]
    for name in ("fsync", "fdatasync"):
        command += ["-c", f"enable name=posix/io/sync/{name},failinfo=5,onetime"]
    run = failing.submit(mebibytes=2.5, rounds=4)
    for event in events(server, run):
        if event.kind == "phase" and event.subject == "collect":
            subprocess.run([*command, str(server.process.pid)], check=True, timeout=20)
        if event.kind == "status" and event.subject == "paused":
            assert "error" in event.message
            resume(failing, run)
    failing.finish(run, rounds=4, mebibytes=2.5)
    assert "failed by a bug" not in server.log
    told = server.log[before:]
    assert "Input/output error" in told or "disk I/O error" in told
