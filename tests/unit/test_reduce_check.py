"""The check of an upload: the same verdict and the same norm, however the bytes were cut on their way."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fsllm.v1.tensors_pb2 import Manifest
from fsllm_common.errors import UpdateRejected
from fsllm_common.tensors.arrays import encode
from fsllm_common.tensors.manifest import WIRE_TYPES, payload_digest
from fsllm_server.reduce.check import PayloadCheck

SHAPES = {"a": (1,), "b": (3, 7), "c": (0,), "d": (300_001,)}


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def update(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Manifest, Path]:
    generator = np.random.default_rng(5)
    arrays = {name: generator.standard_normal(shape, dtype=np.float32) for name, shape in SHAPES.items()}
    payload = tmp_path_factory.mktemp("check") / "payload"
    return encode(arrays, WIRE_TYPES[request.param], payload), payload


def checked(manifest: Manifest, payload: Path, data: bytes, cuts: list[int], max_norm: float | None = None) -> float:
    check = PayloadCheck(manifest)
    edges = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    for begin, end in itertools.pairwise(edges):
        check.update(memoryview(data)[begin:end])
    return check.finish(payload, max_norm)


def test_the_norm_is_that_of_the_values(update: tuple[Manifest, Path]) -> None:
    manifest, payload = update
    whole = np.random.default_rng(5)
    values = np.concatenate([whole.standard_normal(shape, dtype=np.float32).ravel() for shape in SHAPES.values()])
    norm = checked(manifest, payload, payload.read_bytes(), [])
    assert norm == pytest.approx(float(np.linalg.norm(values.astype(np.float64))), rel=1e-4)


@given(cuts=st.lists(st.integers(0, 2_000_000), max_size=6))
def test_an_interrupted_upload_has_the_norm_of_one_in_one_go(update: tuple[Manifest, Path], cuts: list[int]) -> None:
    manifest, payload = update
    data = payload.read_bytes()
    read = PayloadCheck(manifest)
    read.read(payload)
    chunked = list(range(0, len(data), 1 << 20))
    assert checked(manifest, payload, data, chunked) == read.finish(payload, None)
    assert checked(manifest, payload, data, cuts) == pytest.approx(read.finish(payload, None), rel=1e-12)


@given(at=st.integers(0, 300_022), cuts=st.lists(st.integers(0, 2_000_000), max_size=4))
def test_a_value_that_is_not_finite_is_found_in_its_tensor(
    update: tuple[Manifest, Path], tmp_path_factory: pytest.TempPathFactory, at: int, cuts: list[int]
) -> None:
    manifest, payload = Manifest(), tmp_path_factory.getbasetemp() / "broken"
    manifest.CopyFrom(update[0])
    data = bytearray(update[1].read_bytes())
    width = len(data) // 300_023
    data[at * width : (at + 1) * width] = b"\xff" * width  # NaN in every type
    payload.write_bytes(data)
    with pytest.raises(UpdateRejected, match="digest"):
        checked(manifest, payload, bytes(data), cuts)
    manifest.digest = payload_digest(manifest, payload)
    name = "a" if at < 1 else "b" if at < 22 else "d"
    with pytest.raises(UpdateRejected, match=f"'{name}' holds NaN"):
        checked(manifest, payload, bytes(data), cuts)


def test_a_norm_beyond_the_bound_is_refused(update: tuple[Manifest, Path]) -> None:
    manifest, payload = update
    data = payload.read_bytes()
    norm = checked(manifest, payload, data, [])
    assert checked(manifest, payload, data, [], max_norm=norm) == norm
    with pytest.raises(UpdateRejected, match="norm"):
        checked(manifest, payload, data, [], max_norm=norm * 0.999)
