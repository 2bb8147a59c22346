"""Blobs and spools: durable, content-addressed, complete or not there; uploads that resume."""

import asyncio
import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fsllm.v1.tensors_pb2 import ELEMENT_TYPE_BFLOAT16, ELEMENT_TYPE_FLOAT32, Manifest
from fsllm_common.errors import FsllmError
from fsllm_common.files import make_folder
from fsllm_common.tensors.arrays import encode
from fsllm_server.store.blobs import Blobs
from fsllm_server.store.spools import Spool, Spools


def payload(folder: Path, arrays: dict[str, Any] | None = None) -> tuple[Manifest, bytes]:
    arrays = arrays if arrays is not None else {"a": np.arange(30, dtype=np.float32), "b": np.ones((2, 5), np.float32)}
    manifest = encode(arrays, ELEMENT_TYPE_FLOAT32, folder / "encoded", adapter_config='{"r": 1}')
    return manifest, (folder / "encoded").read_bytes()


def test_a_blob_is_there_whole_under_its_digest(tmp_path: Path) -> None:
    manifest, data = payload(tmp_path)
    blobs = Blobs(tmp_path / "blobs")
    with blobs.create(manifest) as writer:
        writer.write(memoryview(data)[:50])
        writer.write(memoryview(data)[50:])
        with pytest.raises(FsllmError):
            blobs.get(manifest.digest)
        done = writer.commit()
    assert done.digest == manifest.digest
    again = Blobs(tmp_path / "blobs").get(manifest.digest)
    assert again == done
    assert again.payload.read_bytes() == data
    # Configurations belong to runs; blobs are shared by content.
    assert again.manifest.adapter_config == ""
    with blobs.create(manifest) as writer:
        writer.write(memoryview(data))
        assert writer.commit() == done
    assert [path.name for path in blobs.folder.iterdir()] == [manifest.digest.hex()]


def test_a_blob_is_synced_before_it_is_visible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest, data = payload(tmp_path)
    blobs = Blobs(tmp_path / "blobs")
    happened: list[str] = []

    def fsync(descriptor: int, really: Callable[[int], None] = os.fsync) -> None:
        happened.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        really(descriptor)

    def rename(path: Path, target: Path, really: Callable[[Path, Path], Path] = Path.rename) -> None:
        happened.append("rename")
        really(path, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "rename", rename)
    with blobs.create(manifest) as writer:
        writer.write(memoryview(data))
        writer.commit()
    at = happened.index("rename")
    assert {Path(path).name for path in happened[:at]} >= {"payload", "manifest"}
    assert str(blobs.folder) in happened[at:]


def test_what_a_crash_left_half_written_is_swept_away(tmp_path: Path) -> None:
    manifest, data = payload(tmp_path)
    blobs = Blobs(tmp_path / "blobs")
    blobs.create(manifest).write(memoryview(data)[:10])
    assert len(list(blobs.folder.iterdir())) == 1
    assert list(Blobs(tmp_path / "blobs").folder.iterdir()) == []


def test_an_incomplete_blob_can_not_be_committed(tmp_path: Path) -> None:
    manifest, data = payload(tmp_path)
    blobs = Blobs(tmp_path / "blobs")
    with blobs.create(manifest) as writer:
        writer.write(memoryview(data)[:-4])
        with pytest.raises(ValueError, match="156 bytes written of 160"):
            writer.commit()
    assert list(blobs.folder.iterdir()) == []


@pytest.mark.parametrize("call", ["pwrite", "fsync"])
def test_a_full_disk_says_so_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    manifest, data = payload(tmp_path)
    blobs = Blobs(tmp_path / "blobs")

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, call, full)

    def store() -> None:
        with blobs.create(manifest) as writer:
            writer.write(memoryview(data))
            writer.commit()

    with pytest.raises(FsllmError) as error:
        store()
    assert error.value.reason == "DISK_FULL"
    assert str(tmp_path / "blobs") in error.value.message
    assert list(blobs.folder.iterdir()) == []


def test_what_can_not_fit_is_refused_before_it_is_written(tmp_path: Path) -> None:
    manifest, _ = payload(tmp_path)
    manifest.payload_bytes = 1 << 60
    with pytest.raises(FsllmError) as error:
        Blobs(tmp_path / "blobs").create(manifest)
    assert error.value.reason == "DISK_FULL"
    with pytest.raises(FsllmError) as error:
        Spools(tmp_path / "spools").open("r", 1, "a", manifest)
    assert error.value.reason == "DISK_FULL"


def write(spool: Spool, data: bytes) -> None:
    with contextlib.closing(spool):
        spool.write(spool.offset, memoryview(data)[spool.offset :])


async def test_an_upload_is_verified_and_found_again(tmp_path: Path) -> None:
    manifest, data = payload(tmp_path)
    spools = Spools(tmp_path / "spools")
    spool = spools.open("r", 1, "a", manifest)
    spool.write(0, memoryview(data))
    verified = await spool.verify(manifest, max_norm=None)
    values = [*range(30), *[1] * 10]
    assert verified.norm == pytest.approx(sum(v * v for v in values) ** 0.5)
    found = Spools(tmp_path / "spools").recorded("r", 1, "a", manifest.digest)
    assert found.manifest == manifest
    assert found.payload.read_bytes() == data
    await spools.sweep(lambda run, round_: ())
    assert spools.offset("r", 1, "a", manifest.digest) == 0
    with pytest.raises(FsllmError) as missing:
        spools.recorded("r", 1, "a", manifest.digest)
    assert missing.value.reason == "STATE_CORRUPT"


async def test_an_upload_is_synced_before_it_is_verified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest, data = payload(tmp_path)
    spool = Spools(tmp_path / "spools").open("r", 1, "a", manifest)
    spool.write(0, memoryview(data))
    synced: list[str] = []

    def fdatasync(descriptor: int, really: Callable[[int], None] = os.fdatasync) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        really(descriptor)

    monkeypatch.setattr(os, "fdatasync", fdatasync)
    verified = await spool.verify(manifest, max_norm=None)
    assert synced == [str(verified.payload)]

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fdatasync", full)
    with pytest.raises(FsllmError) as error:
        await Spools(tmp_path / "spools").open("r", 1, "a", manifest).verify(manifest, max_norm=None)
    assert error.value.reason == "DISK_FULL"


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cuts=st.lists(st.integers(0, 160), max_size=5))
def test_an_upload_cut_anywhere_goes_on_there(tmp_path_factory: pytest.TempPathFactory, cuts: list[int]) -> None:
    folder = tmp_path_factory.mktemp("spool")
    manifest, data = payload(folder)
    for cut in sorted(cuts):
        # A new Spools each time: nothing but the file remembers.
        spool = Spools(folder / "spools").open("r", 1, "a", manifest)
        spool.write(spool.offset, memoryview(data)[spool.offset : max(cut, spool.offset)])
        spool.close()
        assert Spools(folder / "spools").offset("r", 1, "a", manifest.digest) == cut
    spool = Spools(folder / "spools").open("r", 1, "a", manifest)
    assert spool.offset == max(cuts, default=0)
    spool.write(spool.offset, memoryview(data)[spool.offset :])
    verified = asyncio.run(spool.verify(manifest, max_norm=None))
    assert verified.payload.read_bytes() == data


def test_chunks_must_follow_each_other_and_stay_inside(tmp_path: Path) -> None:
    manifest, data = payload(tmp_path)
    spool = Spools(tmp_path / "spools").open("r", 1, "a", manifest)
    spool.write(0, memoryview(data)[:10])
    for offset, length in ((11, 5), (0, 10), (10, 200)):
        with pytest.raises(FsllmError) as error:
            spool.write(offset, memoryview(bytes(length)))
        assert error.value.reason == "OFFSET_OUT_OF_RANGE"
    assert spool.offset == 10
    spool.close()


async def test_an_upload_that_ends_early_is_kept_but_not_verified(tmp_path: Path) -> None:
    manifest, data = payload(tmp_path)
    spools = Spools(tmp_path / "spools")
    spool = spools.open("r", 1, "a", manifest)
    spool.write(0, memoryview(data)[:10])
    with pytest.raises(FsllmError) as error, contextlib.closing(spool):
        await spool.verify(manifest, max_norm=None)
    assert error.value.reason == "OFFSET_OUT_OF_RANGE"
    assert spools.offset("r", 1, "a", manifest.digest) == 10


async def test_wrong_bytes_are_dropped(tmp_path: Path) -> None:
    manifest, data = payload(tmp_path)
    spools = Spools(tmp_path / "spools")
    for at in (0, len(data) - 1):
        wrong = bytearray(data)
        wrong[at] ^= 1
        spool = spools.open("r", 1, "a", manifest)
        spool.write(0, memoryview(bytes(wrong)))
        with pytest.raises(FsllmError) as error:
            await spool.verify(manifest, max_norm=None)
        assert error.value.reason == "DIGEST_MISMATCH"
        assert spools.offset("r", 1, "a", manifest.digest) == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("narrow", [False, True])
async def test_values_that_are_not_finite_are_refused(tmp_path: Path, bad: float, narrow: bool) -> None:
    from fsllm_common.tensors.manifest import describe, payload_digest, role_of

    array = np.zeros(300_000, np.float32)
    array[290_000] = bad
    element_type = ELEMENT_TYPE_BFLOAT16 if narrow else ELEMENT_TYPE_FLOAT32
    data = array.tobytes() if not narrow else (array.view(np.uint32) >> 16).astype(np.uint16).tobytes()
    manifest = describe([("a", (100,), role_of("a")), ("b", (299_900,), role_of("b"))], element_type)
    (tmp_path / "raw").write_bytes(data)
    manifest.digest = payload_digest(manifest, tmp_path / "raw")
    spools = Spools(tmp_path / "spools")
    spool = spools.open("r", 1, "s", manifest)
    spool.write(0, memoryview(data))
    with pytest.raises(FsllmError) as error:
        await spool.verify(manifest, max_norm=None)
    assert error.value.reason == "NOT_FINITE"
    assert "'b'" in error.value.message
    assert spools.offset("r", 1, "s", manifest.digest) == 0


async def test_the_norm_is_over_all_tensors(tmp_path: Path) -> None:
    manifest, data = payload(tmp_path, {"a": np.full(9, 1, np.float32), "b": np.full(16, 1, np.float32)})
    spools = Spools(tmp_path / "spools")
    for bound, accepted in ((5.0, True), (4.99, False)):
        spool = spools.open("r", 1, "a", manifest)
        spool.write(spool.offset, memoryview(data)[spool.offset :])
        if accepted:
            assert (await spool.verify(manifest, max_norm=bound)).norm == 5.0
        else:
            with pytest.raises(FsllmError) as error:
                await spool.verify(manifest, max_norm=bound)
            assert error.value.reason == "NORM_TOO_LARGE"


def test_another_payload_takes_the_place_of_a_partial_one(tmp_path: Path) -> None:
    first, data = payload(tmp_path)
    spools = Spools(tmp_path / "spools")
    write(spools.open("r", 1, "a", first), data[:40])
    write(spools.open("r", 1, "b", first), data[:40])
    second, _ = payload(tmp_path, {"a": np.zeros(30, np.float32), "b": np.ones((2, 5), np.float32)})
    spools.open("r", 1, "a", second).close()
    assert spools.offset("r", 1, "a", first.digest) == 0
    assert spools.offset("r", 1, "b", first.digest) == 40


def test_a_second_stream_takes_an_upload_over(tmp_path: Path) -> None:
    manifest, data = payload(tmp_path)
    spools = Spools(tmp_path / "spools")
    old = spools.open("r", 1, "a", manifest)
    old.write(0, memoryview(data)[:40])
    new = spools.open("r", 1, "a", manifest)
    assert new.offset == 40
    with pytest.raises(FsllmError) as error:
        old.write(40, memoryview(data)[40:])
    assert error.value.reason == "NOT_WANTED"
    new.write(40, memoryview(data)[40:])
    old.close()
    new.close()


async def test_an_upload_whose_round_ends_while_it_is_verified_is_not_wanted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest, data = payload(tmp_path)
    spools = Spools(tmp_path / "spools")
    spool = spools.open("r", 1, "a", manifest)
    spool.write(0, memoryview(data))

    def reach(name: str) -> None:
        if name == "file.rename":
            asyncio.run(spools.sweep(lambda run, round_: ()))

    monkeypatch.setattr("fsllm_common.files.reach", reach)
    with pytest.raises(FsllmError, match="without this upload") as error:
        await spool.verify(manifest, max_norm=None)
    assert error.value.reason == "NOT_WANTED"
    assert [path.name for path in spools.folder.iterdir()] == [".keep"]


async def test_rounds_that_nobody_knows_are_swept(tmp_path: Path) -> None:
    manifest, data = payload(tmp_path)
    spools = Spools(tmp_path / "spools")
    for run, round_ in (("r", 1), ("r", 2), ("old", 1)):
        write(spools.open(run, round_, "a", manifest), data)
    await spools.sweep(lambda run, round_: {"a"} if (run, round_) == ("r", 2) else ())
    kept = [
        place for place in (("r", 1), ("r", 2), ("old", 1)) if spools.offset(place[0], place[1], "a", manifest.digest)
    ]
    assert kept == [("r", 2)]


def test_a_folder_that_a_killed_process_made_is_synced_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The simulation's seed 19: killed between mkdir and sync, then an acknowledged upload went with the power."""
    (tmp_path / "run").mkdir()
    synced: list[Path] = []
    monkeypatch.setattr("fsllm_common.files.sync_folder", synced.append)
    make_folder(tmp_path / "run" / "0" / "site")
    assert synced == [tmp_path, tmp_path / "run", tmp_path / "run" / "0"]
    synced.clear()
    make_folder(tmp_path / "run" / "0" / "site")
    assert synced == [tmp_path / "run" / "0"]
