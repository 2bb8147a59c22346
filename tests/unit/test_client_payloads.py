"""Deltas and version 0 on their way to the wire, and the noop algorithm's closed form."""

import json
from pathlib import Path

import numpy as np
import pytest

from fsllm.v1.tensors_pb2 import ELEMENT_TYPE_BFLOAT16
from fsllm_client.link.download import CachedVersion
from fsllm_client.site import payloads, synthetic
from fsllm_common.errors import FsllmError
from fsllm_common.plan import Plan
from fsllm_common.tensors.arrays import Arrays, decode, encode, load_arrays, save_arrays
from fsllm_common.tensors.manifest import WIRE_TYPES, compatible, payload_digest, validate

CONFIG = json.dumps({"peft_type": "LORA"})


def plan(kind: str = "bf16", **keys: object) -> Plan:
    return Plan.model_validate({"name": "p", "model": {"name": "m"}, "wire": {"element_type": kind}, **keys})


def stored(folder: Path, name: str, arrays: Arrays, kind: str) -> CachedVersion:
    path = folder / name
    return CachedVersion(encode(arrays, WIRE_TYPES[kind], path), path)  # type: ignore[index]


@pytest.fixture
def arrays() -> dict[str, "np.ndarray[tuple[int, ...], np.dtype[np.float32]]"]:
    generator = np.random.Generator(np.random.PCG64(3))
    return {
        "x.lora_A.weight": generator.standard_normal((8, 64)).astype(np.float32),
        "x.lora_B.weight": np.zeros((32, 8), np.float32),
    }


@pytest.mark.parametrize("kind", ["fp32", "fp16", "bf16"])
def test_version_zero_may_differ_by_a_rounding_and_no_more(tmp_path: Path, arrays: Arrays, kind: str) -> None:
    nearly = {name: array + np.float32(4e-7) for name, array in arrays.items()}
    theirs = stored(tmp_path, "theirs", arrays, kind)
    payloads.refuse_difference(stored(tmp_path, "own", nearly, "fp32"), [theirs], plan(kind), 8)
    for at in ("x.lora_A.weight", "x.lora_B.weight"):
        # Beyond the rounding of the wire's type, at one element only.
        other = {name: array.copy() for name, array in arrays.items()}
        other[at].flat[5] += 3e-6 + abs(float(other[at].flat[5])) * {"fp32": 0, "fp16": 2**-10, "bf16": 2**-7}[kind]
        with pytest.raises(FsllmError, match=at) as caught:
            payloads.refuse_difference(stored(tmp_path, "own", other, "fp32"), [theirs], plan(kind), 8)
        assert caught.value.reason == "VERSION_ZERO_MISMATCH"


def test_version_zero_must_have_the_same_names_and_shapes(tmp_path: Path, arrays: Arrays) -> None:
    theirs = stored(tmp_path, "theirs", arrays, "bf16")
    less = {"x.lora_A.weight": arrays["x.lora_A.weight"]}
    turned = {**arrays, "x.lora_A.weight": arrays["x.lora_A.weight"].reshape(64, 8)}
    for other, told in (
        (less, "only the run's version 0 has x.lora_B.weight"),
        (turned, r"\[64, 8\] here and \[8, 64\]"),
    ):
        with pytest.raises(FsllmError, match=told):
            payloads.refuse_difference(stored(tmp_path, "own", other, "fp32"), [theirs], plan(), 8)


def test_the_adapter_reaches_the_trainer_and_comes_from_it_unchanged(tmp_path: Path, arrays: Arrays) -> None:
    save_arrays(arrays, tmp_path / "built.safetensors", metadata={"adapter_config": CONFIG})
    manifest = payloads.encode_adapter(tmp_path / "built.safetensors", plan(), tmp_path / "payload")
    assert manifest.adapter_config == CONFIG
    payloads.write_adapter([CachedVersion(manifest, tmp_path / "payload")], tmp_path / "base.safetensors")
    back = load_arrays(tmp_path / "base.safetensors")
    assert {name: array.tobytes() for name, array in back.items()} == {n: a.tobytes() for n, a in arrays.items()}


def test_a_delta_passes_the_pipeline_before_it_is_encoded(tmp_path: Path, arrays: Arrays) -> None:
    save_arrays(arrays, tmp_path / "delta.safetensors")
    clipped = plan(pipeline=[{"stage": "clip", "norm": 0.25}])
    manifest, facts = payloads.encode_delta(tmp_path / "delta.safetensors", clipped, tmp_path / "payload")
    assert {spec.element_type for spec in manifest.tensors} == {ELEMENT_TYPE_BFLOAT16}
    sent = decode(manifest, tmp_path / "payload")
    norm = float(np.sqrt(sum(np.sum(np.square(a, dtype=np.float64)) for a in sent.values())))
    assert norm == pytest.approx(0.25, rel=4e-3)
    assert facts.clipped
    whole = float(np.sqrt(sum(np.sum(np.square(a, dtype=np.float64)) for a in arrays.values())))
    assert facts.norm == pytest.approx(whole)
    direction = sent["x.lora_A.weight"] / arrays["x.lora_A.weight"]
    assert np.allclose(direction, 0.25 / whole, rtol=5e-3)


def test_the_synthetic_tensors_have_the_plans_number_and_size() -> None:
    for tensors, mebibytes in ((64, 8.0), (3, 0.01), (1, 1.0), (16, 0.00001)):
        made = synthetic.shapes(
            plan(algorithm={"name": "noop", "synthetic": {"tensors": tensors, "mebibytes": mebibytes}})
        )
        elements = sum(int(np.prod(shape)) for shape in made.values())
        assert elements == max(1, round(mebibytes * 2**18))
        assert len(made) == min(tensors, elements)


@pytest.mark.parametrize("kind", ["fp32", "fp16", "bf16"])
def test_a_made_up_delta_is_what_it_says_in_every_wire_type(tmp_path: Path, kind: str) -> None:
    noop = plan(kind, algorithm={"name": "noop", "synthetic": {"tensors": 5, "mebibytes": 1.3}})
    zero = synthetic.write_version_zero(noop, tmp_path / "zero")
    value = synthetic.delta_value("hospital-a", 3)
    manifest = synthetic.write_delta(noop, zero, value, tmp_path / "delta")
    validate(manifest)
    compatible(manifest, zero, WIRE_TYPES[noop.wire.element_type])
    assert payload_digest(manifest, tmp_path / "delta") == manifest.digest
    assert all(bool(np.all(array == np.float32(value))) for array in decode(manifest, tmp_path / "delta").values())


@pytest.mark.parametrize(("kind", "width"), [("fp32", 4), ("bf16", 2), ("fp16", 2)])
def test_a_trained_adapter_is_narrowed_on_the_wire_whatever_its_tensors_are_called(
    tmp_path: Path, kind: str, width: int
) -> None:
    """FederatedScope narrows tensors that are called fc or conv only, and so nothing of a LoRA."""
    names = [f"model.layers.{at}.{module}.lora_{key}.weight" for at in (0, 1) for module in "qv" for key in "AB"]
    arrays = {name: np.linspace(-1, 1, 24, dtype=np.float32).reshape(4, 6) for name in names}
    save_arrays(arrays, tmp_path / "delta", durable=False)
    manifest, _ = payloads.encode_delta(tmp_path / "delta", plan(kind), tmp_path / "payload")
    assert manifest.payload_bytes == (tmp_path / "payload").stat().st_size == len(names) * 24 * width
    for name, array in decode(manifest, tmp_path / "payload").items():
        np.testing.assert_allclose(array, arrays[name], atol=2**-8)


def test_sites_and_rounds_have_different_deltas_and_seeds_different_beginnings(tmp_path: Path) -> None:
    values = [synthetic.delta_value(site, round_) for site in ("a", "b", "c") for round_ in range(1, 9)]
    assert all(0 < value <= 1 for value in values)
    assert len(set(values)) > 12
    digests = set()
    for seed in (1, 1, 2):
        noop = plan(seed=seed, algorithm={"name": "noop", "synthetic": {"tensors": 2, "mebibytes": 0.1}})
        digests.add(synthetic.write_version_zero(noop, tmp_path / "zero").digest)
    assert len(digests) == 2
