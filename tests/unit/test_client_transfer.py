"""What a transfer leaves on disk, however it is cut; and how long is waited between attempts."""

from pathlib import Path
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fsllm.v1.tensors_pb2 import ELEMENT_TYPE_FLOAT32, Manifest
from fsllm_client.link.backoff import Backoff
from fsllm_client.link.download import KEPT, VersionCache
from fsllm_client.link.retry import until_done
from fsllm_common.errors import FsllmError, Refused, Unavailable
from fsllm_common.tensors.arrays import encode


def version(folder: Path, value: float = 1.0, elements: int = 100) -> tuple[Manifest, bytes]:
    path = folder / "made"
    array = np.arange(elements, dtype=np.float32) + np.float32(value)
    manifest = encode({"a": array}, ELEMENT_TYPE_FLOAT32, path)
    return manifest, path.read_bytes()


@given(
    cuts=st.lists(st.integers(min_value=0, max_value=400), max_size=6), restart=st.integers(min_value=0, max_value=6)
)
def test_a_download_may_be_cut_anywhere_and_goes_on(
    tmp_path_factory: pytest.TempPathFactory, cuts: list[int], restart: int
) -> None:
    root = tmp_path_factory.mktemp("cache")
    manifest, payload = version(tmp_path_factory.mktemp("made"))
    cache = VersionCache(root)
    partial = cache.partial("run", manifest.digest)
    for at, cut in enumerate(sorted({*cuts, len(payload)})):
        if at == restart:  # another process goes on with the file
            partial = VersionCache(root).partial("run", manifest.digest)
        partial.begin(manifest)
        partial.write(partial.offset, memoryview(payload[partial.offset : cut]))
    found = cache.keep(partial)
    assert found.payload.read_bytes() == payload
    again = VersionCache(root).find(manifest.digest)
    assert again is not None
    assert again.manifest == manifest


def test_what_is_not_the_version_is_thrown_away(tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    manifest, payload = version(tmp_path)
    cache = VersionCache(tmp_path / "cache")
    partial = cache.partial("run", manifest.digest)
    with pytest.raises(Unavailable, match="sent"):
        partial.begin(version(tmp_path, 2.0)[0])
    partial.begin(manifest)
    with pytest.raises(Unavailable, match="offset 4"):
        partial.write(4, memoryview(payload[4:]))
    partial.write(0, memoryview(payload[:-4]))
    with pytest.raises(Unavailable, match="396 of 400"):
        cache.keep(partial)
    with pytest.raises(Unavailable):
        partial.write(396, memoryview(b"toolong"))
    partial.write(396, memoryview(b"evil"))
    with pytest.raises(Unavailable) as caught:
        cache.keep(partial)
    assert caught.value.reason == "DIGEST_MISMATCH"
    assert partial.offset == 0
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_cached_version_damaged_on_disk_is_not_used(tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    manifest, payload = version(tmp_path)
    cache = VersionCache(tmp_path / "cache")
    partial = cache.partial("run", manifest.digest)
    partial.begin(manifest)
    partial.write(0, memoryview(payload))
    kept = cache.keep(partial)
    kept.payload.write_bytes(b"\0" * len(payload))
    assert VersionCache(tmp_path / "cache").find(manifest.digest) is None
    assert list((tmp_path / "cache").iterdir()) == []


def test_the_cache_keeps_only_the_newest_versions(tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    cache = VersionCache(tmp_path / "cache")
    digests = []
    for value in range(KEPT + 3):
        manifest, payload = version(tmp_path, float(value))
        partial = cache.partial("run", manifest.digest)
        partial.begin(manifest)
        partial.write(0, memoryview(payload))
        cache.keep(partial)
        digests.append(manifest.digest)
    assert [cache.find(digest) is not None for digest in digests] == [False] * 2 + [True] * (KEPT + 1)


def test_the_cache_keeps_the_parts_in_use_however_old_they_are(tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    cache = VersionCache(tmp_path / "cache")
    digests = []
    for value in range(KEPT + 4):
        manifest, payload = version(tmp_path, float(value))
        if not digests:
            cache.use([manifest.digest])
        partial = cache.partial("run", manifest.digest)
        partial.begin(manifest)
        partial.write(0, memoryview(payload))
        cache.keep(partial)
        digests.append(manifest.digest)
    assert [cache.find(digest) is not None for digest in digests] == [True] + [False] * 2 + [True] * (KEPT + 1)


def test_waits_grow_to_a_cap_are_spread_and_begin_again() -> None:
    backoff = Backoff(0.2, 15.0, Random(1))  # noqa: S311
    waits = [backoff.wait() for _ in range(12)]
    steps = [min(0.2 * 2**at, 15.0) for at in range(12)]
    assert all(step / 2 <= wait <= step for wait, step in zip(waits, steps, strict=True))
    assert len({round(wait / step, 6) for wait, step in zip(waits, steps, strict=True)}) > 6
    backoff.reset()
    assert backoff.wait() <= 0.2
    assert backoff.wait(asked=30.0) == 30.0


@pytest.mark.parametrize(
    ("error", "tries"),
    [
        (Unavailable("SERVER_UNREACHABLE", "away"), 3),
        (Unavailable("CHUNK_CORRUPT", "bits"), 3),
        (FsllmError("SITE_IDLE", "slow", retry_after=0.001), 3),
        (Refused("NOT_WANTED", "late"), 1),
        (FsllmError("STATE_CORRUPT", "disk"), 1),
    ],
)
async def test_only_what_may_pass_is_tried_again(error: FsllmError, tries: int) -> None:
    attempts = 0

    async def attempt() -> str:
        nonlocal attempts
        attempts += 1
        if attempts < 3:
            raise error
        return "done"

    if tries == 1:
        with pytest.raises(FsllmError):
            await until_done("a test", attempt, lambda: 0, Backoff(0.001, 0.002))
    else:
        assert await until_done("a test", attempt, lambda: 0, Backoff(0.001, 0.002)) == "done"
    assert attempts == tries
