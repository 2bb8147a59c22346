"""Each kind of adapter in the trainer: what a round moves, what it leaves alone, and what PEFT makes of the result."""

import importlib.util
import json
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from fsllm_client.data.packing import keeps_examples_apart
from fsllm_client.trainer import lora_xs
from fsllm_client.trainer.adapters import adapter_parameters, attach, initial_adapter
from fsllm_client.trainer.base_model import load_model, shape_of_model
from fsllm_client.trainer.group import Group
from fsllm_client.trainer.orders import Build, Evaluate, Prepare, Train
from fsllm_client.trainer.session import Session
from fsllm_client.trainer.tensor_files import read_tensors, write_tensors
from fsllm_client.trainer.vera import INPUTS
from fsllm_common.errors import InputError, ModelUnusable, PlanInvalid, SettingsInvalid
from fsllm_common.philox import uniform
from fsllm_common.plan import Plan, plan_from_json
from fsllm_common.plan.schema import UNFIT_KINDS, AdapterKind

pytestmark = pytest.mark.filterwarnings("ignore")

KINDS = get_args(AdapterKind)
PROMPT_KINDS = ("prefix", "prompt", "p-tuning")
SMALL = {"rank": 3, "block_size": 3, "virtual_tokens": 4, "encoder_hidden_size": 10}
"""The tiny model's layers have 24, 45 and 48 inputs."""


def _plan(kind: str, **sections: dict[str, Any]) -> Plan:
    train = {"steps": 3, "batch_size": 6, "precision": "fp32", "learning_rate": 0.02, **sections.get("train", {})}
    return Plan.model_validate(
        {
            "name": "t",
            "seed": 5,
            "model": {"name": "tiny", **sections.get("model", {})},
            "adapter": {"kind": kind, **SMALL, **sections.get("adapter", {})},
            "train": train,
            "deepspeed": sections.get("deepspeed", {}),
            "data": {
                "template": "plain",
                "max_length": 24,
                "validation_fraction": 0.2,
                "packing": kind not in PROMPT_KINDS,
            },
        }
    )


class Site:
    """A worker that was told to prepare, with version 0."""

    def __init__(self, folder: Path, plan: Plan, group: Group, model: Path, rows: Path, **more: object) -> None:
        self.folder = folder
        self.session = Session(lambda: group, lambda _: None, bool)
        order = {"run_id": "r", "plan": plan, "model": model, "data": rows, "role": "site", **more}
        self.prepared = self.session.carry_out(Prepare.model_validate(order))
        self.base = folder / "0.safetensors"
        self.session.carry_out(Build(adapter=self.base))

    def train(self, base: Path | None = None) -> dict[str, torch.Tensor]:
        delta = self.folder / "delta.safetensors"
        self.session.carry_out(Train(round=1, base=base or self.base, delta=delta))
        return read_tensors(delta)

    def loss(self, adapter: Path) -> float:
        return self.session.carry_out(Evaluate(adapter=adapter)).metrics["loss"]

    def next(self, delta: dict[str, torch.Tensor]) -> Path:
        start, path = read_tensors(self.base), self.folder / "1.safetensors"
        write_tensors(path, {name: t + delta[name] if name in delta else t for name, t in start.items()})
        return path


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_round_lowers_the_loss_from_the_base_models(
    kind: str, tmp_path: Path, alone: Group, tiny_model: Path, tiny_rows: Path
) -> None:
    site = Site(tmp_path, _plan(kind, train={"steps": 6}), alone, tiny_model, tiny_rows)
    delta = site.train()
    assert all(bool(tensor.abs().max() > 0) for tensor in delta.values())
    assert site.loss(site.next(delta)) < site.loss(site.base) - 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["vera", "oft", "lora-xs"])
def test_stage_and_precision_change_nothing_that_matters(
    kind: str, tmp_path: Path, alone: Group, tiny_model: Path, tiny_rows: Path
) -> None:
    settings = tmp_path / "ds.json"
    settings.write_text(json.dumps({"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}))
    deltas = []
    for number, (precision, config) in enumerate([("fp32", None), ("fp32", settings), ("bf16", None)]):
        folder = tmp_path / str(number)
        folder.mkdir()
        plan = _plan(kind, train={"precision": precision, "optimizer": "sgd", "learning_rate": 0.5})
        deltas.append(Site(folder, plan, alone, tiny_model, tiny_rows, deepspeed_config=config).train())
    whole, partitioned, halved = deltas
    for name, delta in whole.items():
        scale = float(delta.abs().max())
        assert float((partitioned[name] - delta).abs().max()) <= 1e-5 * max(scale, 1e-3)
        # Of what hardly moves, there are but a few units in the last place.
        assert float((halved[name] - delta).norm()) <= 0.1 * max(float(delta.norm()), 1e-6)


@pytest.mark.slow
def test_of_lora_xs_only_r_is_trained_and_sent(tmp_path: Path, alone: Group, tiny_model: Path, tiny_rows: Path) -> None:
    site = Site(tmp_path, _plan("lora-xs"), alone, tiny_model, tiny_rows)
    start = read_tensors(site.base)
    delta = site.train()
    assert {name.rpartition(".lora_")[2] for name in start} == {"A.weight", "B.weight", "R.weight"}
    assert delta.keys() == {name for name in start if ".lora_R." in name}
    assert site.prepared.counts["parameters"] == 9 * len(delta)
    # What another site has worked out is taken, not this site's own.
    turned = {name: -tensor if ".lora_A." in name else tensor for name, tensor in start.items()}
    other = tmp_path / "turned.safetensors"
    write_tensors(other, turned)
    mirrored = site.train(other)
    assert all(torch.allclose(mirrored[name], -tensor, atol=1e-6) for name, tensor in delta.items())


def test_factors_are_the_weights_own_leading_singular_vectors() -> None:
    generator = torch.Generator().manual_seed(0)
    left, _ = torch.linalg.qr(torch.randn(60, 40, generator=generator, dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(40, 40, generator=generator, dtype=torch.float64))
    singular = 0.8 ** torch.arange(40, dtype=torch.float64)
    weight = (left * singular) @ right.T
    a, b = lora_xs.factors(weight, 5, seed=1)
    assert torch.allclose(a @ a.T, torch.eye(5, dtype=torch.float64), atol=1e-12)
    assert torch.allclose((a @ right[:, :5]).abs(), torch.eye(5, dtype=torch.float64), atol=1e-6)
    assert torch.allclose(b.norm(dim=0), singular[:5], rtol=1e-8)
    assert torch.allclose(b @ a, (left[:, :5] * singular[:5]) @ right[:, :5].T, atol=1e-6)
    assert bool((a.gather(1, a.abs().argmax(1, keepdim=True)) > 0).all())


def test_factors_hardly_feel_another_order_of_addition() -> None:
    weight = torch.randn(48, 45, generator=torch.Generator().manual_seed(3))
    order = torch.randperm(48, generator=torch.Generator().manual_seed(4))
    a, b = lora_xs.factors(weight, 8, seed=1)
    # The same weight with its rows in another order has the same right singular vectors, reached by other roundings.
    other_a, other_b = lora_xs.factors(weight[order], 8, seed=1)
    assert float((a - other_a).abs().max()) < 1e-9
    assert float((b[order] - other_b).abs().max()) < 1e-9


def test_version_0_of_lora_xs_is_made_of_the_base_weights(tiny_model: Path) -> None:
    tensors, _ = initial_adapter(_plan("lora-xs"), load_model(tiny_model, torch.float32))
    layer = "model.layers.1.mlp.down_proj"
    weight = load_model(tiny_model, torch.float32).get_submodule(layer).weight.detach().double()
    a, b, r = (tensors[f"base_model.model.{layer}.lora_{which}.weight"].double() for which in "ABR")
    assert torch.allclose(b, weight @ a.T, atol=1e-6)
    largest = torch.linalg.svdvals(weight)
    assert b.norm(dim=0).tolist() == pytest.approx(largest[:3].tolist(), rel=1e-3)
    assert not r.any()


def test_a_rank_that_a_weight_does_not_have_is_refused(tiny_model: Path) -> None:
    plan = _plan("lora-xs", adapter={"rank": 9})  # keys and values are 8 wide
    with pytest.raises(ModelUnusable, match=r"k_proj has a weight of 8 x 45, which has no 9") as caught:
        initial_adapter(plan, load_model(tiny_model, torch.float32))
    assert caught.value.reason == "MODEL_UNSUITABLE"


def test_a_block_size_that_does_not_divide_is_refused_rather_than_changed(tiny_model: Path) -> None:
    with pytest.raises(ModelUnusable, match=r"4 does not divide the 45 inputs") as caught:
        attach(_plan("oft", adapter={"block_size": 4}), shape_of_model(tiny_model))
    assert caught.value.reason == "MODEL_UNSUITABLE"


def test_a_layer_that_peft_can_not_adapt_is_no_crash() -> None:
    model = GPT2LMHeadModel(GPT2Config(n_embd=24, n_layer=1, n_head=2, vocab_size=30, n_positions=16))
    with pytest.raises(ModelUnusable, match="PEFT can not put oft on it: Target module Conv1D") as caught:
        attach(_plan("oft"), model)
    assert caught.value.reason == "MODEL_UNSUITABLE"


def test_lora_xs_adapts_weights_that_are_stored_transposed() -> None:
    model = GPT2LMHeadModel(GPT2Config(n_embd=24, n_layer=1, n_head=2, vocab_size=30, n_positions=16))
    weight = model.transformer.h[0].attn.c_attn.weight.detach().clone()  # (inputs, outputs)
    tensors, _ = initial_adapter(_plan("lora-xs", adapter={"targets": ["c_attn"]}), model)
    a, b = (tensors[f"base_model.model.transformer.h.0.attn.c_attn.lora_{which}.weight"] for which in "AB")
    assert (a.shape, b.shape) == ((3, 24), (72, 3))
    assert torch.allclose(b, weight.T @ a.T, atol=1e-6)


def test_veras_projections_are_the_portable_ones_in_every_layer_and_do_not_travel(tiny_model: Path) -> None:
    model = attach(_plan("vera"), load_model(tiny_model, torch.float32))
    bound_a, bound_b = (6 / 48) ** 0.5, (6 / 3) ** 0.5
    a, b = torch.from_numpy(uniform((3, 48), bound_a, 5, 0)), torch.from_numpy(uniform((48, 3), bound_b, 5, 1))
    layers = [module for module in model.modules() if hasattr(module, "vera_lambda_d")]
    assert len(layers) == 14
    for layer in layers:
        assert torch.equal(layer.vera_A["default"], a)
        assert torch.equal(layer.vera_B["default"], b)
    tensors, config = initial_adapter(_plan("vera"), shape_of_model(tiny_model))
    assert {name.rpartition(".")[2] for name in tensors} == {"vera_lambda_b", "vera_lambda_d"}
    assert json.loads(config)[INPUTS] == 48


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in PROMPT_KINDS])
def test_packed_examples_stay_apart_with_this_kind(kind: str, tiny_model: Path) -> None:
    model = attach(_plan(kind), load_model(tiny_model, torch.float32)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapter_parameters(model).values():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    assert keeps_examples_apart(model, 259)


def test_adalora_is_refused_with_its_reason_and_a_cure() -> None:
    text = json.dumps({"name": "t", "model": {"name": "embedded"}, "adapter": {"kind": "adalora"}})
    with pytest.raises(PlanInvalid, match=r"adapter\.kind: .*ranks of its own.*say lora") as caught:
        plan_from_json(text.encode())
    assert UNFIT_KINDS["adalora"] in caught.value.message


needs_bitsandbytes = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="no bitsandbytes")


@pytest.fixture
def any_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have bitsandbytes think that this CPU knows bfloat16, which changes what it does after the first measurement."""
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)


@pytest.mark.slow
@needs_bitsandbytes
@pytest.mark.usefixtures("any_cpu")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_quantised_base_is_trained_on_and_never_changed(
    quantization: str, precision: str, tmp_path: Path, alone: Group, tiny_model: Path, tiny_rows: Path
) -> None:
    (tmp_path / "plain").mkdir()
    train = {"precision": precision, "steps": 6}
    site = Site(
        tmp_path, _plan("lora", model={"quantization": quantization}, train=train), alone, tiny_model, tiny_rows
    )
    plain = Site(tmp_path / "plain", _plan("lora", train=train), alone, tiny_model, tiny_rows)
    assert site.base.read_bytes() == plain.base.read_bytes(), "what travels must not depend on how a base is held"
    model = site.session._run.engine.model
    layer = model.get_submodule("base_model.model.model.layers.0.mlp.up_proj.base_layer")
    assert layer.weight.dtype == (torch.uint8 if quantization == "nf4" else torch.int8)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters() if "lora" not in name}
    delta = site.train()
    after = dict(model.named_parameters())
    assert before
    assert all(torch.equal(parameter, after[name]) for name, parameter in before.items())
    assert site.loss(site.next(delta)) < site.loss(site.base) - 1e-3
    assert site.loss(site.base) != plain.loss(site.base)
    assert site.loss(site.base) == pytest.approx(plain.loss(site.base), rel=0.05)


@pytest.mark.slow
@needs_bitsandbytes
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "lora"])
def test_every_kind_is_trained_on_a_quantised_base(
    kind: str, tmp_path: Path, alone: Group, tiny_model: Path, tiny_rows: Path
) -> None:
    site = Site(tmp_path, _plan(kind, model={"quantization": "nf4"}, train={"steps": 6}), alone, tiny_model, tiny_rows)
    assert site.loss(site.next(site.train())) < site.loss(site.base) - 1e-3


def test_quantisation_without_its_library_is_said_with_a_cure(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "bitsandbytes" else found(name, *more)
    )
    with pytest.raises(InputError, match="nf4 needs bitsandbytes") as caught:
        load_model(tiny_model, torch.float32, "nf4")
    assert caught.value.reason == "TRAINER_MISSING"
    assert "fsllm[quantize]" in str(caught.value)


@needs_bitsandbytes
def test_a_sites_own_stage_3_is_refused_for_a_quantised_base(
    tmp_path: Path, alone: Group, tiny_model: Path, tiny_rows: Path
) -> None:
    settings = tmp_path / "ds.json"
    settings.write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    with pytest.raises(SettingsInvalid, match="ZeRO stage 3 cuts weights up"):
        Site(
            tmp_path,
            _plan("lora", model={"quantization": "nf4"}),
            alone,
            tiny_model,
            tiny_rows,
            deepspeed_config=settings,
        )
