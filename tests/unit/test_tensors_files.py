"""Files that are wholly there or not at all, and a disk that is really full (/dev/full)."""

import os
import stat
from pathlib import Path

import pytest

from fsllm_common.errors import Unavailable
from fsllm_common.files import disk_errors, replacing, write_atomic


def test_the_new_content_takes_the_place_of_the_old_with_the_mode_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file"
    for data, mode in ((b"one", 0o644), (b"two", 0o600)):
        write_atomic(path, data, mode=mode)
        assert path.read_bytes() == data
        assert stat.S_IMODE(path.stat().st_mode) == mode
    assert list(path.parent.iterdir()) == [path]


def test_a_secret_is_at_no_time_readable_by_others(tmp_path: Path) -> None:
    old_mask = os.umask(0)
    try:
        with replacing(tmp_path / "key", mode=0o600) as fresh:
            assert stat.S_IMODE(fresh.stat().st_mode) == 0o600
            fresh.write_bytes(b"secret")
    finally:
        os.umask(old_mask)


def test_a_failure_leaves_the_old_content_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomic(path, b"old")

    def fail() -> None:
        with replacing(path) as fresh:
            fresh.write_bytes(b"half")
            raise RuntimeError("half-way")

    with pytest.raises(RuntimeError, match="half-way"):
        fail()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_says_so_and_names_the_folder(tmp_path: Path) -> None:
    with pytest.raises(Unavailable) as caught, disk_errors(tmp_path), Path("/dev/full").open("wb", buffering=0) as full:
        full.write(b"x")
    assert caught.value.reason == "DISK_FULL"
    assert str(tmp_path) in caught.value.message
    assert caught.value.retry_after is not None


def test_other_errors_of_the_system_pass(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), disk_errors(tmp_path):
        (tmp_path / "none").read_bytes()
