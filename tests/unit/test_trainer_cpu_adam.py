import os
import subprocess
import sys
from pathlib import Path

import pytest

from fsllm_client.trainer.cpu_adam import clear_stale_locks, is_built


def _lock(extensions: Path) -> Path:
    lock = extensions / "cpu_adam" / "lock"
    lock.parent.mkdir()
    return lock


def test_a_lock_that_a_killed_build_left_is_cleared_and_said_to_be(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lock = _lock(tmp_path)
    take = "import os, sys; from torch.utils.file_baton import FileBaton; FileBaton(sys.argv[1]).try_acquire()"
    take += "; os.kill(0, 9)"
    subprocess.run([sys.executable, "-c", take, str(lock)], check=False, start_new_session=True)
    assert lock.exists()

    assert clear_stale_locks(tmp_path) == [lock]

    assert not lock.exists()
    assert str(lock) in caplog.text


def test_a_lock_that_a_live_build_holds_stays(tmp_path: Path) -> None:
    from torch.utils.file_baton import FileBaton

    baton = FileBaton(str(_lock(tmp_path)))
    assert baton.try_acquire()
    assert clear_stale_locks(tmp_path) == []
    assert Path(baton.lock_file_path).exists()
    baton.release()


def test_no_folder_is_no_lock_and_nothing_built(tmp_path: Path) -> None:
    assert clear_stale_locks(tmp_path / "absent") == []
    assert not is_built(tmp_path)
    (tmp_path / "cpu_adam").mkdir()
    (tmp_path / "cpu_adam" / "cpu_adam.so").write_bytes(os.urandom(1))
    assert is_built(tmp_path)
