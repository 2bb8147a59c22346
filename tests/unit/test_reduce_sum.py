"""The SUM reducer against a closed form in float64, and its promises: order, bits, memory, and nothing half-done."""

import resource
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fsllm.v1.tensors_pb2 import ELEMENT_TYPE_BFLOAT16, ELEMENT_TYPE_FLOAT16, ELEMENT_TYPE_FLOAT32, ElementType
from fsllm_common.errors import FsllmError
from fsllm_common.tensors.arrays import BLOCK, Array, decode, encode
from fsllm_common.tensors.manifest import payload_digest
from fsllm_server.reduce import Stopped
from fsllm_server.reduce.blocks import OPEN_FILES, Source, uniform_type
from fsllm_server.reduce.fold import Folded, Step
from fsllm_server.reduce.fold import fold as fold_sources
from fsllm_server.reduce.sink import Digests, Sink
from fsllm_server.store.blobs import Blobs, StoredVersion

F32, F16, BF16 = ELEMENT_TYPE_FLOAT32, ELEMENT_TYPE_FLOAT16, ELEMENT_TYPE_BFLOAT16
DTYPES: dict[Any, Any] = {F32: np.float32, F16: np.float16, BF16: ml_dtypes.bfloat16}


def plus(base: Array, mean: Array) -> Array:
    return base + mean


def fold(
    base: StoredVersion | None,
    updates: list[tuple[StoredVersion, float]],
    apply: Any,  # noqa: ANN401
    wire: ElementType.ValueType,
    sink: Sink,
    **options: Any,  # noqa: ANN401
) -> Folded:
    sources = [Source(update.payload, uniform_type(update.manifest)) for update, _ in updates]
    shares = [share for _, share in updates]
    step = Step(lambda block: apply(block.base, block.mean), 1, {})
    return fold_sources((base or updates[0][0]).manifest, base, sources, shares, step, wire, sink, **options)


def stored(folder: Path, name: str, arrays: dict[str, Any], element_type: ElementType.ValueType = F32) -> StoredVersion:
    path = folder / name
    return StoredVersion(encode(arrays, element_type, path), path)


def tensors(result: StoredVersion) -> dict[str, Any]:
    assert payload_digest(result.manifest, result.payload) == result.manifest.digest
    return decode(result.manifest, result.payload)


def random_arrays(seed: int, shapes: Mapping[str, tuple[int, ...]], scale: float = 1.0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {name: (rng.standard_normal(shape) * scale).astype(np.float32) for name, shape in shapes.items()}


shapes_strategy = st.dictionaries(
    st.text("abcdefgh._", min_size=1, max_size=8),
    st.lists(st.integers(0, 5), max_size=3).map(tuple),
    max_size=4,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shapes=shapes_strategy,
    seeds=st.lists(st.integers(0, 1000), min_size=1, max_size=5),
    raw=st.data(),
    sent=st.sampled_from([F32, F16, BF16]),
    wire=st.sampled_from([F32, F16, BF16]),
)
def test_the_sum_is_the_closed_form(
    tmp_path_factory: pytest.TempPathFactory,
    shapes: dict[str, tuple[int, ...]],
    seeds: list[int],
    raw: st.DataObject,
    sent: ElementType.ValueType,
    wire: ElementType.ValueType,
) -> None:
    folder = tmp_path_factory.mktemp("fold")
    weights = raw.draw(st.lists(st.integers(1, 1000), min_size=len(seeds), max_size=len(seeds)))
    shares = [weight / sum(weights) for weight in weights]
    base = random_arrays(7, shapes)
    deltas = [random_arrays(seed, shapes, 0.1) for seed in seeds]
    updates = [
        (stored(folder, f"u{i}", d, sent), share) for i, (d, share) in enumerate(zip(deltas, shares, strict=True))
    ]
    out = fold(stored(folder, "base", base), updates, plus, wire, Blobs(folder / "blobs"))

    master, published = tensors(out.master), tensors(out.published)
    assert master.keys() == published.keys() == shapes.keys()
    for name in shapes:
        exact = base[name].astype(np.float64)
        for delta, share in zip(deltas, shares, strict=True):
            exact = exact + share * delta[name].astype(DTYPES[sent]).astype(np.float64)
        np.testing.assert_allclose(master[name], exact, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(published[name], master[name].astype(DTYPES[wire]).astype(np.float32))
    assert (out.master.digest == out.published.digest) or wire != F32


def sample(folder: Path, order: list[int], elements: int = BLOCK + 17) -> Folded:
    """Fold three updates that span two blocks, written to disk in ``order``."""
    shapes = {"w": (elements,)}
    files = {i: stored(folder, f"u{i}", random_arrays(i, shapes, 10.0**i), BF16) for i in order}
    updates = [(files[i], share) for i, share in ((0, 0.2), (1, 0.3), (2, 0.5))]
    return fold(stored(folder, "base", random_arrays(9, shapes)), updates, plus, BF16, Blobs(folder / "blobs"))


def test_the_same_set_gives_the_same_bits_whatever_the_order_of_arrival(tmp_path: Path) -> None:
    results = []
    for order in ([0, 1, 2], [2, 0, 1]):
        folder = tmp_path / str(order[0])
        folder.mkdir()
        results.append(sample(folder, order))
    assert results[0].master.digest == results[1].master.digest
    assert results[0].published.payload.read_bytes() == results[1].published.payload.read_bytes()


def test_it_is_float32_in_the_order_given_to_the_last_bit(tmp_path: Path) -> None:
    out = sample(tmp_path, [0, 1, 2])
    shapes = {"w": (BLOCK + 17,)}
    total = np.zeros(BLOCK + 17, np.float32)
    for i, share in ((0, 0.2), (1, 0.3), (2, 0.5)):
        narrow = random_arrays(i, shapes, 10.0**i)["w"].astype(ml_dtypes.bfloat16).astype(np.float32)
        total = total + np.float32(share) * narrow
    np.testing.assert_array_equal(tensors(out.master)["w"], random_arrays(9, shapes)["w"] + total)


def test_version_0_is_the_one_update(tmp_path: Path) -> None:
    arrays = random_arrays(3, {"a": (2, 3), "b": ()})
    out = fold(None, [(stored(tmp_path, "u", arrays, BF16), 1.0)], plus, BF16, Blobs(tmp_path / "blobs"))
    for name, array in arrays.items():
        np.testing.assert_array_equal(tensors(out.master)[name], array.astype(ml_dtypes.bfloat16).astype(np.float32))
    assert out.published.payload.read_bytes() == (tmp_path / "u").read_bytes()


def test_no_tensors_at_all(tmp_path: Path) -> None:
    blobs = Blobs(tmp_path / "blobs")
    out = fold(stored(tmp_path, "base", {}), [(stored(tmp_path, "u", {}), 1.0)], plus, BF16, blobs)
    assert out.published.manifest.payload_bytes == 0
    assert out.published.payload.stat().st_size == 0


def test_a_version_that_is_not_finite_is_not_published(tmp_path: Path) -> None:
    blobs = Blobs(tmp_path / "blobs")
    base = stored(tmp_path, "base", {"a": np.zeros(3, np.float32), "b": np.full(3, 6e4, np.float32)})
    update = stored(tmp_path, "u", {"a": np.zeros(3, np.float32), "b": np.full(3, 6e4, np.float32)})
    with pytest.raises(FsllmError) as error:
        fold(base, [(update, 1.0)], plus, F16, blobs)
    assert error.value.reason == "NOT_FINITE"
    assert "'b'" in error.value.message
    assert list(blobs.folder.iterdir()) == []
    # In float32 the same sum is fine.
    assert tensors(fold(base, [(update, 1.0)], plus, F32, blobs).master)["b"][0] == np.float32(1.2e5)


def test_a_fold_that_is_stopped_leaves_nothing(tmp_path: Path) -> None:
    blobs = Blobs(tmp_path / "blobs")
    update = stored(tmp_path, "u", {"w": np.ones(2 * BLOCK, np.float32)})
    asked: list[int] = []

    def stopped() -> bool:
        asked.append(1)
        return len(asked) == 2

    with pytest.raises(Stopped):
        fold(update, [(update, 1.0)], plus, F32, blobs, stopped=stopped)
    assert list(blobs.folder.iterdir()) == []


def test_a_truncated_upload_is_noticed(tmp_path: Path) -> None:
    blobs = Blobs(tmp_path / "blobs")
    update = stored(tmp_path, "u", {"w": np.ones(100, np.float32)})
    update.payload.write_bytes(update.payload.read_bytes()[:-4])
    with pytest.raises(FsllmError) as error:
        fold(None, [(update, 1.0)], plus, F32, blobs)
    assert error.value.reason == "STATE_CORRUPT"
    assert list(blobs.folder.iterdir()) == []


@pytest.mark.slow
def test_memory_and_open_files_grow_neither_with_the_payload_nor_with_the_number(tmp_path: Path) -> None:
    blobs = Blobs(tmp_path / "blobs")
    small = stored(tmp_path, "small", {"w": np.ones(BLOCK, np.float32)})
    # Enough blocks that every lane and its thread have had their memory before it is measured.
    warm = stored(tmp_path, "warm", {"w": np.ones(8 * BLOCK, np.float32)})
    fold(warm, [(warm, 0.5)] * 2, plus, BF16, blobs)
    big = tmp_path / "big"
    block = np.ones(BLOCK, np.float32).tobytes()
    with big.open("wb") as file:
        for _ in range(48):
            file.write(block)
    manifest = type(small.manifest)()
    manifest.CopyFrom(small.manifest)
    manifest.tensors[0].shape[:] = [48 * BLOCK]
    manifest.payload_bytes = 48 * len(block)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    fold(StoredVersion(manifest, big), [(StoredVersion(manifest, big), 0.125)] * 8, plus, BF16, blobs)
    # 48 MiB each of nine inputs, through a handful of blocks of 1 MiB.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 12 * 1024
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    files = 0
    others = len(list(Path("/proc/self/fd").iterdir()))

    def counting(base: Array, mean: Array) -> Array:
        nonlocal files
        files = max(files, len(list(Path("/proc/self/fd").iterdir())) - others)
        return base + mean

    out = fold(small, [(small, 1 / 1024)] * 1024, counting, F32, blobs)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 4 * 1024
    assert files < OPEN_FILES
    np.testing.assert_array_equal(tensors(out.master)["w"], np.full(BLOCK, 2, np.float32))


def test_many_updates_are_added_to_the_last_bit_as_few_are(tmp_path: Path) -> None:
    shapes = {"a": (7,), "b": (BLOCK,)}
    count = OPEN_FILES + 3
    rng = np.random.default_rng(5)
    weights = rng.dirichlet(np.ones(count)).tolist()
    few = [stored(tmp_path, f"u{i}", random_arrays(i, shapes, 10.0**i), (F32, F16, BF16)[i]) for i in range(3)]
    updates = [(few[i % 3], weights[i]) for i in range(count)]
    base = stored(tmp_path, "base", random_arrays(9, shapes))
    out = fold(base, updates, plus, F32, Blobs(tmp_path / "blobs"))
    for name in shapes:
        total = np.zeros(shapes[name], np.float32)
        for i in range(count):
            sent = random_arrays(i % 3, shapes, 10.0 ** (i % 3))[name].astype(DTYPES[(F32, F16, BF16)[i % 3]])
            total = total + np.float32(weights[i]) * sent.astype(np.float32)
        np.testing.assert_array_equal(tensors(out.master)[name], random_arrays(9, shapes)[name] + total)


@pytest.mark.parametrize("wire", [F32, BF16])
def test_the_digests_alone_are_those_of_the_blobs(tmp_path: Path, wire: ElementType.ValueType) -> None:
    base = stored(tmp_path, "base", random_arrays(1, {"a": (BLOCK + 5,), "b": ()}))
    update = stored(tmp_path, "u", random_arrays(2, {"a": (BLOCK + 5,), "b": ()}))
    kept = fold(base, [(update, 0.5)], plus, wire, Blobs(tmp_path / "blobs"))
    before = sorted(path.name for path in tmp_path.rglob("*"))
    seen = fold(base, [(update, 0.5)], plus, wire, Digests())
    assert (seen.master.digest, seen.published.digest) == (kept.master.digest, kept.published.digest)
    assert sorted(path.name for path in tmp_path.rglob("*")) == before
