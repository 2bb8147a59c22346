"""Reading some segments of a payload as one flat array, as reading the tensors one by one gives it."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fsllm.v1.tensors_pb2 import ELEMENT_TYPE_BFLOAT16, ELEMENT_TYPE_FLOAT32, TENSOR_ROLE_LORA_A, TENSOR_ROLE_LORA_B
from fsllm_common.errors import FsllmError
from fsllm_common.tensors.arrays import BLOCK, encode
from fsllm_server.reduce.blocks import BlockReader, Source, blocks, rows_at_a_time, scratch, segments
from fsllm_server.reduce.fold import Step, fold
from fsllm_server.reduce.sink import Digests
from fsllm_server.store.blobs import StoredVersion

BF16, F32 = ELEMENT_TYPE_BFLOAT16, ELEMENT_TYPE_FLOAT32


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), cuts=st.lists(st.integers(0, 60), max_size=8), kept_open=st.booleans())
def test_segments_are_one_flat_array(tmp_path: Path, data: st.DataObject, cuts: list[int], kept_open: bool) -> None:
    values = np.arange(60, dtype=np.float32) - 30
    (tmp_path / "p").write_bytes(values.astype(ml_dtypes.bfloat16).tobytes())
    ends = sorted(cuts)
    chosen = [(a, b - a) for a, b in list(pairwise(ends))[::2]]
    wanted = np.concatenate([np.empty(0, np.float32), *(values[a : a + n] for a, n in chosen)])
    start = data.draw(st.integers(0, len(wanted)))
    count = data.draw(st.integers(0, len(wanted) - start))
    reader = BlockReader(tmp_path / "p", BF16, scratch(), segments=chosen)
    if kept_open:
        reader.open()
    try:
        np.testing.assert_array_equal(reader.read(start, count), wanted[start : start + count])
        with pytest.raises(IndexError):
            reader.read(start, len(wanted) - start + 1)
    finally:
        reader.close()


def test_a_segment_beyond_the_file_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "p").write_bytes(bytes(40))
    with pytest.raises(FsllmError) as error:
        BlockReader(tmp_path / "p", F32, scratch(), segments=[(8, 3)]).read(0, 3)
    assert error.value.reason == "STATE_CORRUPT"


def test_segments_of_a_manifest_join_neighbours(tmp_path: Path) -> None:
    arrays = {f"{n}.lora_{f}.weight": np.zeros((2, 3), np.float32) for n in "ab" for f in "AB"}
    arrays["empty.lora_A.weight"] = np.zeros((0, 3), np.float32)
    manifest = encode(arrays, F32, tmp_path / "p")
    by_name = {spec.name: index for index, spec in enumerate(manifest.tensors)}
    assert segments(manifest, lambda spec: True) == ((0, 24),)
    assert segments(manifest, lambda spec: False) == ()
    for role in (TENSOR_ROLE_LORA_A, TENSOR_ROLE_LORA_B):
        found = segments(manifest, lambda spec, role=role: spec.role == role)  # type: ignore[misc]
        letter = "A" if role == TENSOR_ROLE_LORA_A else "B"
        assert {first for first, count in found if count} == {6 * by_name[f"{n}.lora_{letter}.weight"] for n in "ab"}
        assert sum(count for _, count in found) == 12


@pytest.mark.parametrize("base", [True, False])
def test_a_part_is_folded_by_itself(tmp_path: Path, base: bool) -> None:
    """The tensors of a part, out of uploads that hold others between them, as if they had been sent alone."""
    rng = np.random.default_rng(0)
    length = BLOCK // 2 + 3

    def arrays() -> dict[str, Any]:
        return {f"{n}.lora_{f}.weight": rng.standard_normal(length).astype(np.float32) for n in "abc" for f in "AB"}

    def stored(name: str, tensors: dict[str, Any]) -> StoredVersion:
        return StoredVersion(encode(tensors, F32, tmp_path / name), tmp_path / name)

    def part(tensors: dict[str, Any]) -> dict[str, Any]:
        return {name: array for name, array in tensors.items() if "lora_B" in name}

    sent = [arrays() for _ in range(3 if base else 1)]
    uploads = [stored(f"u{i}", one) for i, one in enumerate(sent)]
    alone = [stored(f"alone{i}", part(one)) for i, one in enumerate(sent)]
    kept = stored("base", part(arrays())) if base else None
    step = Step(lambda block: block.base + block.mean, 1, {})
    shares = [0.5, 0.25, 0.25] if base else [1.0]
    at = segments(uploads[0].manifest, lambda spec: spec.role == TENSOR_ROLE_LORA_B)
    assert len(at) == 3
    tensors = alone[0].manifest
    got = fold(tensors, kept, [Source(u.payload, F32, at) for u in uploads], shares, step, BF16, Digests())
    wanted = fold(tensors, kept, [Source(u.payload, F32) for u in alone], shares, step, BF16, Digests())
    assert got.master.digest == wanted.master.digest
    assert got.published.digest == wanted.published.digest


@pytest.mark.parametrize("updates", [1, 2, 10, 100, 1000, 100_000])
def test_rows_in_memory_are_bounded(updates: int) -> None:
    length = rows_at_a_time(updates)
    assert 1 << 10 <= length <= BLOCK
    assert updates * length <= max(1 << 21, updates << 10)
    assert [count for _, count in blocks(2 * length + 1, length)] == [length, length, 1]
