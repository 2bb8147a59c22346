from collections.abc import Callable
from pathlib import Path

import pytest
from blake3 import blake3

from fsllm.v1.tensors_pb2 import (
    ELEMENT_TYPE_BFLOAT16,
    ELEMENT_TYPE_FLOAT16,
    ELEMENT_TYPE_FLOAT32,
    TENSOR_ROLE_HEAD,
    TENSOR_ROLE_LORA_A,
    TENSOR_ROLE_LORA_B,
    TENSOR_ROLE_MAGNITUDE,
    TENSOR_ROLE_OTHER,
    TENSOR_ROLE_PROMPT,
    TENSOR_ROLE_SCALE,
    ElementType,
    Manifest,
    TensorRole,
    TensorSpec,
)
from fsllm_common.errors import UpdateRejected
from fsllm_common.tensors import manifest as m
from fsllm_common.tensors.manifest import PayloadDigest, canonical_text, compatible, describe, payload_digest, validate


def example() -> Manifest:
    made = describe(
        [("b", (2, 3), TENSOR_ROLE_LORA_B), ("a", (), TENSOR_ROLE_SCALE), ("c", (0, 5), TENSOR_ROLE_OTHER)],
        ELEMENT_TYPE_BFLOAT16,
    )
    made.digest = bytes(32)
    return made


def test_the_canonical_text_is_the_one_that_the_proto_file_states() -> None:
    made = example()
    made.tensors[1].element_type = ELEMENT_TYPE_FLOAT32
    made.tensors[2].element_type = ELEMENT_TYPE_FLOAT16
    assert canonical_text(made) == b"a\tbf16\t\t6\nb\tf32\t2,3\t2\nc\tf16\t0,5\t7\n\n"


def test_the_digest_covers_text_and_payload_however_it_is_cut() -> None:
    made = example()
    payload = bytes(range(14))
    expected = blake3(b"a\tbf16\t\t6\nb\tbf16\t2,3\t2\nc\tbf16\t0,5\t7\n\n" + payload).digest()
    digest = PayloadDigest(made)
    digest.update(payload[:1])
    digest.update(memoryview(payload)[1:9])
    digest.update(b"")
    digest.update(bytearray(payload[9:]))
    assert digest.digest() == expected
    assert digest.hexdigest() == expected.hex()


def test_the_digest_of_a_file_is_that_of_its_bytes(tmp_path: Path) -> None:
    made = example()
    for payload in (b"", bytes(range(14)), bytes(3_000_000)):
        path = tmp_path / "payload"
        path.write_bytes(payload)
        streamed = PayloadDigest(made)
        streamed.update(payload)
        assert payload_digest(made, path) == streamed.digest()


def test_every_element_type_and_role_of_the_proto_is_known() -> None:
    types = set(ElementType.values()) - {0}
    assert set(m.WIDTH) == set(m.WIRE_TYPES.values()) == types
    described = describe([("x", (1,), role) for role in TensorRole.values()], ELEMENT_TYPE_FLOAT32)
    assert len(canonical_text(described).splitlines()) == len(TensorRole.values()) + 1


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight", TENSOR_ROLE_LORA_A),
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight", TENSOR_ROLE_LORA_B),
        ("base_model.model.model.embed_tokens.lora_embedding_A", TENSOR_ROLE_LORA_A),
        ("base_model.model.model.layers.1.mlp.up_proj.lora_magnitude_vector", TENSOR_ROLE_MAGNITUDE),
        ("base_model.model.model.layers.1.mlp.down_proj.ia3_l", TENSOR_ROLE_SCALE),
        ("prompt_embeddings", TENSOR_ROLE_PROMPT),
        ("prompt_encoder.default.mlp_head.0.weight", TENSOR_ROLE_PROMPT),
        ("base_model.model.lm_head.modules_to_save.weight", TENSOR_ROLE_HEAD),
        ("tensor-3", TENSOR_ROLE_OTHER),
    ],
)
def test_roles_come_from_pefts_names(name: str, role: int) -> None:
    assert m.role_of(name) == role


def test_honest_manifests_are_valid() -> None:
    validate(example())
    validate(Manifest(digest=bytes(32)))
    described = describe([("t", (1,) * 8, TENSOR_ROLE_OTHER)], ELEMENT_TYPE_FLOAT32, '{"r": 8}')
    described.digest = bytes(32)
    validate(described)
    assert described.payload_bytes == 4


def _resized(manifest: Manifest, shape: list[int], payload_bytes: int) -> None:
    manifest.tensors[1].shape[:] = shape
    manifest.payload_bytes = payload_bytes


@pytest.mark.parametrize(
    ("break_it", "words"),
    [
        (lambda t: setattr(t.tensors[1], "name", ""), "''"),
        (lambda t: setattr(t.tensors[1], "name", "b\ttab"), r"'b\ttab'"),
        (lambda t: setattr(t.tensors[1], "name", "bé"), "printable ASCII"),
        (lambda t: setattr(t.tensors[1], "name", "b" * 513), "512"),
        (lambda t: setattr(t.tensors[1], "name", "a"), "'a' appears twice"),
        (lambda t: setattr(t.tensors[0], "name", "bb"), "'b' comes after 'bb'"),
        (lambda t: setattr(t.tensors[1], "element_type", 0), "unknown element type 0"),
        (lambda t: setattr(t.tensors[1], "element_type", 9), "unknown element type 9"),
        (lambda t: setattr(t.tensors[1], "role", 99), "unknown role 99"),
        (lambda t: _resized(t, [1] * 9, 4), "9 dimensions"),
        (lambda t: _resized(t, [2, 3], 15), "15 payload bytes, but its tensors take 14"),
        # 2^32 x 2^32 elements wrap to 0 in 64 bits: the sum would be honest.
        (lambda t: _resized(t, [2**32, 2**32], 2), "'b' takes the payload past"),
        (lambda t: _resized(t, [2**63, 2], 2), "'b' takes the payload past"),
        (lambda t: setattr(t, "digest", bytes(31)), "31 bytes instead of 32"),
        (lambda t: setattr(t, "adapter_config", "{"), "not JSON"),
        (lambda t: setattr(t, "adapter_config", "[]"), "not a JSON object"),
        (lambda t: setattr(t, "adapter_config", "[" * 100_000), "not JSON"),
        (lambda t: setattr(t, "adapter_config", '"' + "x" * m.MAX_ADAPTER_CONFIG + '"'), "at most"),
    ],
)
def test_a_broken_manifest_is_refused_and_the_tensor_named(break_it: Callable[[Manifest], object], words: str) -> None:
    made = example()
    break_it(made)
    with pytest.raises(UpdateRejected) as caught:
        validate(made)
    assert caught.value.reason == "MANIFEST_INVALID"
    assert words in caught.value.message


def test_too_many_tensors_are_refused() -> None:
    made = Manifest(tensors=[TensorSpec()] * (m.MAX_TENSORS + 1), digest=bytes(32))
    with pytest.raises(UpdateRejected, match="200001 tensors"):
        validate(made)


def test_the_same_tensors_are_compatible_whatever_the_bases_type() -> None:
    compatible(example(), example(), ELEMENT_TYPE_BFLOAT16)
    base = example()
    for spec in base.tensors:
        spec.element_type = ELEMENT_TYPE_FLOAT32
    compatible(example(), base, ELEMENT_TYPE_BFLOAT16)
    compatible(Manifest(), Manifest(), ELEMENT_TYPE_FLOAT32)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.tensors.pop(0), "'a' of the base version is missing"),
        (lambda t: t.tensors.append(TensorSpec(name="z")), "'z' is not in the base version"),
        (lambda t: t.tensors[1].shape.__setitem__(0, 6), "'b' has shape [6, 3]; the base has [2, 3]"),
        (lambda t: t.tensors[0].shape.append(1), "'a' has shape [1]; the base has []"),
        (lambda t: setattr(t.tensors[1], "role", TENSOR_ROLE_LORA_A), "'b' has role"),
        (
            lambda t: setattr(t.tensors[1], "element_type", ELEMENT_TYPE_FLOAT32),
            "'b' is f32; the plan's wire.element_type is bf16",
        ),
    ],
)
def test_other_tensors_are_not(change: Callable[[Manifest], object], words: str) -> None:
    made = example()
    change(made)
    with pytest.raises(UpdateRejected) as caught:
        compatible(made, example(), ELEMENT_TYPE_BFLOAT16)
    assert caught.value.reason == "MANIFEST_INVALID"
    assert words in caught.value.message
