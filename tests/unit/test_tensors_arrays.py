from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fsllm.v1.tensors_pb2 import (
    ELEMENT_TYPE_BFLOAT16,
    ELEMENT_TYPE_FLOAT16,
    ELEMENT_TYPE_FLOAT32,
    TENSOR_ROLE_LORA_A,
    TENSOR_ROLE_OTHER,
    ElementType,
)
from fsllm_common.errors import FsllmError, UpdateRejected
from fsllm_common.tensors import arrays as a
from fsllm_common.tensors.manifest import canonical_text, payload_digest, validate

TORCH = {
    ELEMENT_TYPE_FLOAT32: torch.float32,
    ELEMENT_TYPE_FLOAT16: torch.float16,
    ELEMENT_TYPE_BFLOAT16: torch.bfloat16,
}
TYPES = list(TORCH)

float32_bits = hnp.arrays(np.uint32, st.integers(0, 200)).map(lambda bits: bits.view(np.float32))
shapes = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5)
tensors = st.dictionaries(
    st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E), min_size=1, max_size=20),
    shapes.flatmap(
        lambda shape: hnp.arrays(np.float32, shape, elements=st.floats(-6e4, 6e4, width=32, allow_subnormal=True))
    ),
    max_size=6,
)


@pytest.mark.parametrize("element_type", TYPES)
@given(values=float32_bits)
def test_narrowing_rounds_as_torch_does_on_any_bits(element_type: ElementType.ValueType, values: np.ndarray) -> None:
    values = values[np.isfinite(values)]
    theirs = torch.from_numpy(values.copy()).to(TORCH[element_type])
    ours = a.narrow(values, element_type)
    width = ours.dtype.itemsize
    ours_bits = ours.view(np.uint16 if width == 2 else np.uint32)
    assert np.array_equal(
        ours_bits, theirs.view(torch.int16 if width == 2 else torch.int32).numpy().view(ours_bits.dtype)
    )


@pytest.mark.parametrize("element_type", [ELEMENT_TYPE_FLOAT16, ELEMENT_TYPE_BFLOAT16])
def test_widening_gives_torchs_value_for_all_65536_patterns(element_type: ElementType.ValueType) -> None:
    bits = np.arange(65_536, dtype=np.uint16)
    ours = a.widen(bits.tobytes(), element_type)
    theirs = torch.from_numpy(bits.view(np.int16)).view(TORCH[element_type]).to(torch.float32).numpy()
    assert np.array_equal(ours, theirs, equal_nan=True)
    finite = np.isfinite(ours)
    assert np.array_equal(a.narrow(ours[finite], element_type).view(np.uint16), bits[finite])


def test_ties_go_to_the_even_neighbour() -> None:
    # Half-way between 1 and 1 + 2^-7, and between 1 + 2^-7 and 1 + 2^-6.
    values = np.array([1 + 2**-8, 1 + 2**-7 + 2**-8], dtype=np.float32)
    assert a.narrow(values, ELEMENT_TYPE_BFLOAT16).astype(np.float32).tolist() == [1.0, 1 + 2**-6]


@pytest.mark.parametrize("element_type", TYPES)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(given_tensors=tensors)
def test_what_is_encoded_decodes_to_the_rounded_values(
    tmp_path: Path, element_type: ElementType.ValueType, given_tensors: dict[str, np.ndarray]
) -> None:
    payload = tmp_path / "payload"
    manifest = a.encode(given_tensors, element_type, payload)
    validate(manifest)
    assert payload.stat().st_size == manifest.payload_bytes
    assert manifest.digest == payload_digest(manifest, payload)
    decoded = a.decode(manifest, payload)
    assert set(decoded) == set(given_tensors)
    for name, array in given_tensors.items():
        expected = torch.from_numpy(array.copy()).to(TORCH[element_type]).to(torch.float32).numpy()
        assert decoded[name].dtype == np.float32
        assert decoded[name].shape == array.shape
        assert np.array_equal(decoded[name], expected)
    flat = np.concatenate([np.zeros(0), *(array.reshape(-1) for array in decoded.values())])
    assert a.measure(manifest, payload) == pytest.approx(np.linalg.norm(flat.astype(np.float64)), rel=1e-12)


def test_the_payload_is_little_endian_row_major_in_the_manifests_order(tmp_path: Path) -> None:
    arrays = {"b": np.array([[1, 2], [3, 4]], np.float32).T, "a": np.array(0.5, np.float32)}
    a.encode(arrays, ELEMENT_TYPE_FLOAT32, tmp_path / "p")
    assert (tmp_path / "p").read_bytes() == struct.pack("<5f", 0.5, 1, 3, 2, 4)
    a.encode(arrays, ELEMENT_TYPE_FLOAT16, tmp_path / "p")
    assert (tmp_path / "p").read_bytes() == struct.pack("<5e", 0.5, 1, 3, 2, 4)
    a.encode(arrays, ELEMENT_TYPE_BFLOAT16, tmp_path / "p")
    assert (tmp_path / "p").read_bytes() == b"".join(struct.pack("<f", v)[2:] for v in (0.5, 1, 3, 2, 4))


def test_a_tensor_larger_than_a_block_is_not_mixed_up(tmp_path: Path) -> None:
    array = np.arange(2 * a.BLOCK + 3, dtype=np.float32)
    manifest = a.encode({"x": array, "y": array[:5]}, ELEMENT_TYPE_FLOAT32, tmp_path / "p")
    decoded = a.decode(manifest, tmp_path / "p")
    assert np.array_equal(decoded["x"], array)
    assert np.array_equal(decoded["y"], array[:5])
    bf16 = a.encode({"x": array}, ELEMENT_TYPE_BFLOAT16, tmp_path / "q")
    expected = torch.from_numpy(array).bfloat16().float().numpy()
    assert np.array_equal(a.decode(bf16, tmp_path / "q")["x"], expected)


def test_roles_and_the_configuration_reach_the_manifest(tmp_path: Path) -> None:
    arrays = {"q.lora_A.weight": np.ones(2, np.float32), "z": np.ones(2, np.float32)}
    manifest = a.encode(
        arrays, ELEMENT_TYPE_FLOAT32, tmp_path / "p", roles={"z": TENSOR_ROLE_LORA_A}, adapter_config='{"r": 8}'
    )
    assert [t.role for t in manifest.tensors] == [TENSOR_ROLE_LORA_A, TENSOR_ROLE_LORA_A]
    assert manifest.adapter_config == '{"r": 8}'
    # The configuration is not under the digest, the roles are.
    other = a.encode(arrays, ELEMENT_TYPE_FLOAT32, tmp_path / "p")
    assert other.tensors[1].role == TENSOR_ROLE_OTHER
    assert other.digest != manifest.digest


@pytest.mark.parametrize(
    ("value", "element_type", "words"),
    [
        (np.nan, ELEMENT_TYPE_FLOAT32, "holds NaN or Inf"),
        (np.inf, ELEMENT_TYPE_BFLOAT16, "holds NaN or Inf"),
        (-np.inf, ELEMENT_TYPE_FLOAT16, "holds NaN or Inf"),
        (65_520.0, ELEMENT_TYPE_FLOAT16, "is too large for float16"),
        (3.4e38, ELEMENT_TYPE_BFLOAT16, "is too large for bfloat16"),
    ],
)
def test_what_is_not_finite_is_refused_and_nothing_written(
    tmp_path: Path, value: float, element_type: ElementType.ValueType, words: str
) -> None:
    array = np.zeros(a.BLOCK + 7, np.float32)
    array[-1] = value
    with pytest.raises(UpdateRejected) as caught:
        a.encode({"ok": np.ones(3, np.float32), "sick": array}, element_type, tmp_path / "p")
    assert caught.value.reason == "NOT_FINITE"
    assert "'sick'" in caught.value.message
    assert words in caught.value.message
    assert list(tmp_path.iterdir()) == []


def test_large_but_finite_values_are_finite(tmp_path: Path) -> None:
    array = np.full(1000, 3e38, np.float32)
    manifest = a.encode({"x": array}, ELEMENT_TYPE_FLOAT32, tmp_path / "p")
    assert a.measure(manifest, tmp_path / "p") == pytest.approx(3e38 * 1000**0.5, rel=1e-6)
    a.encode({"x": np.full(3, 65_504, np.float32)}, ELEMENT_TYPE_FLOAT16, tmp_path / "q")


@pytest.mark.parametrize("element_type", TYPES)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_measure_names_the_sick_tensor_of_a_received_payload(
    tmp_path: Path, element_type: ElementType.ValueType, value: float
) -> None:
    manifest = a.encode({"a": np.ones(5, np.float32), "b": np.ones(5, np.float32)}, element_type, tmp_path / "p")
    content = bytearray((tmp_path / "p").read_bytes())
    sick = a.narrow(np.array([value], np.float32), element_type).tobytes()
    content[-len(sick) :] = sick
    (tmp_path / "p").write_bytes(content)
    with pytest.raises(UpdateRejected) as caught:
        a.measure(manifest, tmp_path / "p")
    assert caught.value.reason == "NOT_FINITE"
    assert "'b'" in caught.value.message


def test_a_payload_of_another_length_is_refused(tmp_path: Path) -> None:
    manifest = a.encode({"x": np.ones(5, np.float32)}, ELEMENT_TYPE_FLOAT32, tmp_path / "p")
    (tmp_path / "p").write_bytes(bytes(19))
    for read in (a.decode, a.measure):
        with pytest.raises(FsllmError) as caught:
            read(manifest, tmp_path / "p")
        assert caught.value.reason == "STATE_CORRUPT"


def test_mixed_types_at_odd_offsets_decode(tmp_path: Path) -> None:
    manifest = a.encode(
        {"a": np.ones(3, np.float32), "b": np.ones(1, np.float32)}, ELEMENT_TYPE_FLOAT16, tmp_path / "p"
    )
    manifest.tensors[1].element_type = ELEMENT_TYPE_FLOAT32
    manifest.payload_bytes = 10
    (tmp_path / "p").write_bytes(struct.pack("<3e", 1, 2, 3) + struct.pack("<f", 7))
    assert a.decode(manifest, tmp_path / "p")["b"].tolist() == [7.0]
    assert a.measure(manifest, tmp_path / "p") == pytest.approx((1 + 4 + 9 + 49) ** 0.5)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
@given(given_tensors=tensors)
def test_safetensors_there_and_back(tmp_path: Path, given_tensors: dict[str, np.ndarray]) -> None:
    source, payload, target = tmp_path / "in.safetensors", tmp_path / "p", tmp_path / "out.safetensors"
    a.save_arrays(given_tensors, source, metadata={"adapter_config": '{"r": 2}'})
    manifest = a.from_safetensors(source, ELEMENT_TYPE_FLOAT32, payload)
    assert manifest.adapter_config == '{"r": 2}'
    assert canonical_text(manifest) == canonical_text(a.encode(given_tensors, ELEMENT_TYPE_FLOAT32, tmp_path / "q"))
    a.save_arrays(a.decode(manifest, payload), target, metadata={"format": "pt"})
    loaded = a.load_arrays(target)
    assert set(loaded) == set(given_tensors)
    for name, array in given_tensors.items():
        assert np.array_equal(loaded[name], array)
        assert loaded[name].shape == array.shape
    with safetensors.safe_open(target, "numpy") as file:
        assert file.metadata() == {"format": "pt"}


def test_a_transposed_array_is_saved_as_it_reads(tmp_path: Path) -> None:
    array = np.arange(6, dtype=np.float32).reshape(2, 3).T
    a.save_arrays({"x": array}, tmp_path / "f")
    assert np.array_equal(a.load_arrays(tmp_path / "f")["x"], array)


def test_half_precision_files_are_read_and_others_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "f"
    save_file({"h": torch.tensor([1.5, 2.0]).half(), "b": torch.tensor([3.0]).bfloat16()}, path)
    manifest = a.from_safetensors(path, ELEMENT_TYPE_FLOAT32, tmp_path / "p")
    decoded = a.decode(manifest, tmp_path / "p")
    assert decoded["h"].tolist() == [1.5, 2.0]
    assert decoded["b"].tolist() == [3.0]
    save_file({"i": torch.tensor([1, 2])}, path)
    with pytest.raises(FsllmError, match=r"'i' of .* is I64"):
        a.from_safetensors(path, ELEMENT_TYPE_FLOAT32, tmp_path / "p")
    path.write_bytes(b"no such thing")
    for read in (lambda: a.from_safetensors(path, ELEMENT_TYPE_FLOAT32, tmp_path / "p"), lambda: a.load_arrays(path)):
        with pytest.raises(FsllmError) as caught:
            read()
        assert caught.value.reason == "STATE_CORRUPT"
