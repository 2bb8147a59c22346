"""Inner products against exact rational arithmetic, and their promise: no sum that is rounded in a library's order."""

import math
import resource
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from fsllm.v1.tensors_pb2 import ELEMENT_TYPE_BFLOAT16, ELEMENT_TYPE_FLOAT16, ELEMENT_TYPE_FLOAT32
from fsllm_common.tensors.arrays import BLOCK, dtype_of
from fsllm_server.reduce import Stopped, products
from fsllm_server.reduce.blocks import OPEN_FILES, Source
from fsllm_server.reduce.products import inner_products

F32 = ELEMENT_TYPE_FLOAT32


def stored(folder: Path, rows: Any, element_type: Any = F32) -> list[Source]:  # noqa: ANN401
    for i, row in enumerate(rows):
        (folder / f"u{i}").write_bytes(np.asarray(row, np.float32).astype(dtype_of(element_type)).tobytes())
    return [Source(folder / f"u{i}", element_type) for i in range(len(rows))]


finite = st.floats(width=32, allow_nan=False, allow_infinity=False)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.integers(1, 6).flatmap(lambda n: st.lists(st.lists(finite, min_size=n, max_size=n), min_size=1, max_size=5))
)
@example(rows=[[2.0**-149, 3 * 2.0**-149], [1.5 * 2.0**127, -(2.0**127)]])
def test_against_rational_numbers(tmp_path: Path, rows: list[list[float]]) -> None:
    got = inner_products(stored(tmp_path, rows), len(rows[0]))
    exact = [[Fraction(x) for x in row] for row in rows]
    for i, one in enumerate(exact):
        for j, other in enumerate(exact):
            wanted = sum(a * b for a, b in zip(one, other, strict=True))
            # What is left out of each value, and the rounding of the result.
            bound = len(one) * Fraction(2) ** -33 * max(map(abs, one)) * max(map(abs, other)) + Fraction(2) ** -1000
            assert abs(Fraction(float(got[i, j])) - wanted) <= bound
    np.testing.assert_array_equal(got, got.T)


@pytest.mark.parametrize("element_type", [F32, ELEMENT_TYPE_FLOAT16, ELEMENT_TYPE_BFLOAT16])
def test_large_ones_in_several_blocks(tmp_path: Path, element_type: Any) -> None:  # noqa: ANN401
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((9, BLOCK + 12345)).astype(np.float32)
    sources = stored(tmp_path, rows, element_type)
    got = inner_products(sources, rows.shape[1])
    wide = rows.astype(dtype_of(element_type)).astype(np.longdouble)
    for i, j in ((0, 0), (0, 1), (3, 8)):
        norms = math.sqrt(got[i, i] * got[j, j])
        assert abs(float((wide[i] * wide[j]).sum()) - got[i, j]) < 1e-12 * norms


def test_nothing_that_a_library_adds_is_rounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The worst case for the promise: the longest block of the largest values. In integers, so without any rounding."""
    values = np.full(BLOCK, np.nextafter(np.float32(2), np.float32(0)), np.float32)
    high, low = np.empty(BLOCK), np.empty(BLOCK)
    unit = products._split(values, high, low)
    np.testing.assert_array_equal(unit * (high + low / 2**18), values.astype(np.float64))
    for one in (high, low):
        assert np.abs(one).max() <= 2**17
        for other in (high, low):
            np.testing.assert_array_equal(one, np.rint(one))
            total = sum(int(a) * int(b) for a, b in zip(one.tolist(), other.tolist(), strict=True))
            assert abs(total) < 2**53
            assert int(one @ other) == int(one[::-1] @ other[::-1]) == total


def test_the_same_bits_however_the_elements_are_ordered_in_a_block(tmp_path: Path) -> None:
    """A library that added in another order would do no else; a dot in float64 changes its last bits here."""
    rng = np.random.default_rng(1)
    rows = rng.standard_normal((4, 5000)).astype(np.float32)
    got = inner_products(stored(tmp_path, rows), 5000)
    dots = set()
    for _ in range(5):
        rows = rows[:, rng.permutation(5000)]
        np.testing.assert_array_equal(inner_products(stored(tmp_path, rows), 5000), got)
        dots.add(float(np.cumsum(rows[0].astype(np.float64) * rows[1])[-1]))
    assert len(dots) > 1


def test_the_same_update_twice_is_at_distance_nothing(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    one = rng.standard_normal(3 * BLOCK // 2) * 10 ** rng.uniform(-8, 8, 3 * BLOCK // 2)
    got = inner_products(stored(tmp_path, [one, rng.standard_normal(len(one)), one]), len(one))
    assert got[0, 0] == got[0, 2] == got[2, 2]
    np.testing.assert_array_equal(got[0], got[2])


def test_more_than_there_are_open_files_and_parts_of_payloads(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    rows = rng.integers(-100, 100, (OPEN_FILES + 6, 50)).astype(np.float32)
    sources = stored(tmp_path, rows)
    np.testing.assert_array_equal(inner_products(sources, 50), rows.astype(np.float64) @ rows.T.astype(np.float64))
    some = [Source(one.payload, F32, ((5, 10), (40, 2))) for one in sources]
    cut = np.concatenate([rows[:, 5:15], rows[:, 40:42]], axis=1).astype(np.float64)
    np.testing.assert_array_equal(inner_products(some, 12), cut @ cut.T)


def test_it_stops(tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        inner_products(stored(tmp_path, [[1.0], [2.0]]), 1, lambda: True)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_payload(tmp_path: Path) -> None:
    block = np.ones(BLOCK, np.float32).tobytes()
    with (tmp_path / "big").open("wb") as file:
        for _ in range(64):
            file.write(block)
    warm = [Source(tmp_path / "big", F32, ((0, BLOCK),))] * 8
    inner_products(warm, BLOCK)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    got = inner_products([Source(tmp_path / "big", F32)] * 8, 64 * BLOCK)
    # 64 MiB each of eight inputs.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 4 * 1024
    np.testing.assert_array_equal(got, np.full((8, 8), 64.0 * BLOCK))
