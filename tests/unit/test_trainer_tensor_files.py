"""The trainer's files are whole or not there, for this site's eyes only, and synced where somebody counts on them."""

import errno
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fsllm_client.trainer.tensor_files import read_metadata, read_tensors, write_tensors
from fsllm_common import failpoints
from fsllm_common.errors import Unavailable

OLD, NEW = {"x": torch.zeros(3)}, {"x": torch.tensor([1.0, 2.0, 3.0]), "step": torch.tensor([7])}


@pytest.fixture
def reached() -> Iterator[list[str]]:
    names: list[str] = []
    failpoints.listen(names.append)
    yield names
    failpoints.listen(None)


def test_what_is_written_is_read_again_and_is_nobody_elses(tmp_path: Path) -> None:
    path = tmp_path / "new" / "delta.safetensors"
    write_tensors(path, NEW, {"adapter_config": "{}"})
    found = read_tensors(path)
    assert torch.equal(found["x"], NEW["x"])
    assert int(found["step"]) == 7
    assert read_metadata(path) == {"adapter_config": "{}"}
    assert path.stat().st_mode & 0o777 == 0o600


def test_only_what_is_looked_for_after_a_crash_is_synced(tmp_path: Path, reached: list[str]) -> None:
    write_tensors(tmp_path / "state.safetensors", NEW)
    assert reached == ["file.sync", "file.rename", "file.renamed", "folder.sync", "folder.synced"]
    reached.clear()
    write_tensors(tmp_path / "delta.safetensors", NEW, durable=False)
    assert reached == ["file.rename", "file.renamed"]


@pytest.mark.parametrize("where", ["file.sync", "file.rename"])
@pytest.mark.parametrize(("code", "reason"), [(errno.ENOSPC, "DISK_FULL"), (errno.EIO, "DISK_FAILED")])
def test_a_disk_that_fails_leaves_the_old_file_and_is_said(tmp_path: Path, where: str, code: int, reason: str) -> None:
    path = tmp_path / "state.safetensors"
    write_tensors(path, OLD)

    def fail(name: str) -> None:
        if name == where:
            raise OSError(code, "no")

    failpoints.listen(fail)
    try:
        with pytest.raises(Unavailable) as caught:
            write_tensors(path, NEW)
    finally:
        failpoints.listen(None)
    assert caught.value.reason == reason
    assert torch.equal(read_tensors(path)["x"], OLD["x"])
    assert list(tmp_path.iterdir()) == [path]
