"""The arithmetic of adapter sizes against PEFT itself, on models without weights."""

import json
from pathlib import Path
from typing import get_args

import pytest

from fsllm_common.errors import ModelUnusable
from fsllm_common.plan.schema import Adapter, AdapterKind, Model, Plan
from fsllm_operator.adapter_size import adapter_parameters, adapter_shapes, read_config

LLAMA = {
    "model_type": "llama",
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 97,
}
QWEN3 = {**LLAMA, "model_type": "qwen3", "head_dim": 16}
GPT2 = {"model_type": "gpt2", "n_embd": 48, "n_layer": 2, "n_head": 4, "vocab_size": 97}
NEOX = {**LLAMA, "model_type": "gpt_neox", "intermediate_size": 100}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("config", [LLAMA, QWEN3, GPT2, NEOX], ids=lambda c: c["model_type"])
@pytest.mark.parametrize("kind", get_args(AdapterKind))
def test_as_many_as_the_trainer_trains(config: dict[str, int | str], kind: str) -> None:
    import torch
    import transformers

    from fsllm_client.trainer.adapters import adapter_parameters as travelling
    from fsllm_client.trainer.adapters import attach
    from fsllm_common.algorithms import ADAPTER
    from fsllm_common.algorithms.fedavg import FedAvg
    from fsllm_common.tensors.manifest import role_of

    settings = {"rank": 4, "block_size": 4, "virtual_tokens": 5, "encoder_hidden_size": 24}
    adapter = Adapter.model_validate({"kind": kind, **settings})
    plan = Plan(name="x", model=Model(name="m"), adapter=adapter)
    arguments = {key: value for key, value in config.items() if key != "model_type"}
    expected = adapter_parameters(adapter, config)
    if expected is None:
        assert (kind, config["model_type"]) in (("ia3", "gpt2"), ("oft", "gpt2"))
        return
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.for_model(str(config["model_type"]), **arguments)
        )
    part = FedAvg(plan).part
    tensors = travelling(attach(plan, model.to_empty(device="cpu")))
    trained = sum(tensor.numel() for name, tensor in tensors.items() if part(role_of(name)) == ADAPTER)
    assert expected == trained


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_hidden_layers": None}, "NoneType"),
        ({"hidden_size": "wide"}, "wide"),
        ({"num_attention_heads": 0}, "zero"),
        ({"intermediate_size": ...}, "'intermediate_size' is not in it"),
    ],
)
def test_a_configuration_without_its_sizes_is_refused(changes: dict[str, object], words: str) -> None:
    config = {key: value for key, value in {**LLAMA, **changes}.items() if value is not ...}
    for sized in (adapter_parameters, adapter_shapes):
        with pytest.raises(ModelUnusable, match=words) as caught:
            sized(Adapter(), config)
        assert caught.value.reason == "MODEL_UNSUITABLE"


def test_named_targets() -> None:
    # q: 48 -> 48, v: 48 -> 2 heads of 8; rank 8, three blocks.
    adapter = Adapter(targets=("q_proj", "v_proj"))
    assert adapter_parameters(adapter, LLAMA) == 3 * 8 * ((48 + 48) + (48 + 16))


def test_an_unknown_target_is_named() -> None:
    with pytest.raises(
        ModelUnusable, match=r"'W_pack' is no linear layer of this model; there are down_proj, gate_proj"
    ):
        adapter_parameters(Adapter(targets=("W_pack",)), LLAMA)


@pytest.mark.parametrize("target", ["lm_head", "self_attn.q_proj"])
def test_targets_that_can_not_be_counted_are_no_error(target: str) -> None:
    assert adapter_parameters(Adapter(targets=("v_proj", target)), LLAMA) is None


def test_an_unknown_family_is_no_error() -> None:
    assert adapter_parameters(Adapter(), {"model_type": "mamba", "hidden_size": 8}) is None


def test_config_is_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    assert read_config(tmp_path) == LLAMA


@pytest.mark.parametrize("text", [None, "{", "[]"])
def test_a_folder_without_a_config(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelUnusable, match=r"config\.json") as caught:
        read_config(tmp_path)
    assert caught.value.exit_code == 5
