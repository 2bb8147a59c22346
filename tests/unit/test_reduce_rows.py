"""The BLOCK reducer: every update's values at once, whatever the blocks, in memory that does not grow."""

import resource
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fsllm.v1.tensors_pb2 import ELEMENT_TYPE_BFLOAT16, ELEMENT_TYPE_FLOAT32
from fsllm_common.algorithms import Block
from fsllm_common.tensors.arrays import BLOCK, Array, decode, encode
from fsllm_server.reduce import Stopped, rows
from fsllm_server.reduce.blocks import Source
from fsllm_server.reduce.fold import Folded, Step, fold
from fsllm_server.store.blobs import Blobs, StoredVersion

F32, BF16 = ELEMENT_TYPE_FLOAT32, ELEMENT_TYPE_BFLOAT16


def stored(folder: Path, name: str, values: Array) -> StoredVersion:
    return StoredVersion(encode({"w": values}, F32, folder / name), folder / name)


def add(block: Block) -> Array:
    return block.base + block.mean


def median(values: Array, shares: Sequence[float]) -> Array:
    result: Array = np.median(values, axis=0).astype(np.float32)
    return result


def combined(
    folder: Path,
    base: StoredVersion,
    updates: list[StoredVersion],
    combine: Any,  # noqa: ANN401
    shares: list[float] | None = None,
    **options: Any,  # noqa: ANN401
) -> Folded:
    sources = [Source(update.payload, F32) for update in updates]
    given = shares if shares is not None else [1 / len(updates)] * len(updates)
    step = Step(add, 1, {}, combine)
    return fold(base.manifest, base, sources, given, step, F32, Blobs(folder / "blobs"), **options)


def values_of(folded: Folded) -> Array:
    return decode(folded.master.manifest, folded.master.payload)["w"]


@pytest.mark.parametrize("length", [BLOCK, 1000, 7])
def test_the_same_bits_whatever_the_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, length: int) -> None:
    monkeypatch.setattr(rows, "rows_at_a_time", lambda updates: length)
    rng = np.random.default_rng(0)
    size = (BLOCK + 17) if length > 100 else 1000
    base, *deltas = rng.standard_normal((6, size)).astype(np.float32)
    updates = [stored(tmp_path, f"u{i}", delta) for i, delta in enumerate(deltas)]
    got = values_of(combined(tmp_path, stored(tmp_path, "base", base), updates, median))
    np.testing.assert_array_equal(got, base + np.median(deltas, axis=0).astype(np.float32))


def test_updates_without_a_share_are_left_out(tmp_path: Path) -> None:
    base = stored(tmp_path, "base", np.zeros(10, np.float32))
    updates = [stored(tmp_path, f"u{i}", np.full(10, i, np.float32)) for i in range(4)]
    seen: list[Any] = []

    def combine(values: Array, shares: Sequence[float]) -> Array:
        seen.append((values[:, 0].tolist(), list(shares)))
        return values[0]

    combined(tmp_path, base, updates, combine, [0.0, 0.5, 0.0, 0.25])
    assert seen == [([1.0, 3.0], [0.5, 0.25])]
    nobody = combined(tmp_path, base, updates, combine, [0.0] * 4)
    np.testing.assert_array_equal(values_of(nobody), np.zeros(10))
    assert len(seen) == 1


def test_there_is_no_negative_zero_to_sort(tmp_path: Path) -> None:
    base = stored(tmp_path, "base", np.zeros(2, np.float32))
    update = stored(tmp_path, "u", np.array([-0.0, -1.0], np.float32))
    signs: list[bool] = []

    def combine(values: Array, shares: Sequence[float]) -> Array:
        signs.extend(np.signbit(values[0]).tolist())
        return values[0]

    combined(tmp_path, base, [update], combine)
    assert signs == [False, True]


def test_shares_of_a_sum_may_be_nothing(tmp_path: Path) -> None:
    """And then the update is not even looked for."""
    base = stored(tmp_path, "base", np.ones(3, np.float32))
    update = stored(tmp_path, "u", np.full(3, 2, np.float32))
    gone = StoredVersion(update.manifest, tmp_path / "gone")
    np.testing.assert_array_equal(
        values_of(combined(tmp_path, base, [update, gone], None, [1.5, 0.0])), np.full(3, 4, np.float32)
    )
    np.testing.assert_array_equal(values_of(combined(tmp_path, base, [gone], None, [0.0])), np.ones(3))


def test_it_stops_and_leaves_nothing(tmp_path: Path) -> None:
    update = stored(tmp_path, "u", np.ones(2 * BLOCK, np.float32))
    asked: list[int] = []

    def stopped() -> bool:
        asked.append(1)
        return len(asked) > 5

    with pytest.raises(Stopped):
        combined(tmp_path, update, [update] * 4, median, stopped=stopped)
    assert list((tmp_path / "blobs").iterdir()) == []


@pytest.mark.parametrize("count", [8, 2048, 3000])
def test_memory_is_what_docs_algorithms_says(tmp_path: Path, count: int) -> None:
    """24 MiB of values, more than 2,048 updates 12 KiB each; besides, a few blocks, and a few objects an update."""
    one = stored(tmp_path, "one", np.ones(3 * BLOCK if count < 10 else 10, np.float32))
    combined(tmp_path, one, [one] * 2, median)
    tracemalloc.start()
    combined(tmp_path, one, [one] * count, lambda values, shares: values[0])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    values = 24 * 2**20 if count <= 2048 else count * 12 * 2**10
    assert values < peak < values + 14 * 2**20


@pytest.mark.slow
def test_memory_grows_neither_with_the_payload_nor_with_the_number(tmp_path: Path) -> None:
    def first(values: Array, shares: Sequence[float]) -> Array:
        values.sort(axis=0)
        return values[0]

    warm = stored(tmp_path, "warm", np.ones(8 * BLOCK, np.float32))
    combined(tmp_path, warm, [warm] * 8, first)
    manifest = type(warm.manifest)()
    manifest.CopyFrom(warm.manifest)
    manifest.tensors[0].shape[:] = [64 * BLOCK]
    manifest.payload_bytes = 8 * warm.manifest.payload_bytes
    with (tmp_path / "big").open("wb") as file:
        for _ in range(8):
            file.write(warm.payload.read_bytes())
    big = StoredVersion(manifest, tmp_path / "big")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    combined(tmp_path, big, [big] * 8, first)
    # 64 MiB each of nine inputs.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 12 * 1024
    small = stored(tmp_path, "small", np.ones(BLOCK, np.float32))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    combined(tmp_path, small, [small] * 512, first)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 8 * 1024
