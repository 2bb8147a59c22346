"""What the ledger adds to the base model, beside the same given as a LoRA."""

from pathlib import Path

import pytest
import torch

from fsllm_client.trainer.adapters import attach
from fsllm_client.trainer.base_delta import BaseDelta
from fsllm_client.trainer.base_model import load_model
from fsllm_client.trainer.group import Group
from fsllm_client.trainer.orders import Build, Evaluate, Prepare, Train
from fsllm_client.trainer.session import Session
from fsllm_client.trainer.tensor_files import read_tensors, write_tensors
from fsllm_common.plan import Plan

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def weights(model: torch.nn.Module) -> dict[str, bytes]:
    """Return the bits of the base model's parameters, as they are held."""
    held = {name: parameter for name, parameter in model.named_parameters() if "lora_" not in name}
    return {name: parameter.detach().view(torch.uint8).numpy().tobytes() for name, parameter in held.items()}


@pytest.mark.parametrize(("stage", "quantization"), [(2, "none"), (3, "none"), (2, "nf4"), (2, "int8")])
def test_the_base_with_a_ledger_is_the_base_with_that_lora(
    tmp_path: Path, alone: Group, tiny_model: Path, tiny_rows: Path, stage: int, quantization: str
) -> None:
    if quantization != "none":
        pytest.importorskip("bitsandbytes")
    plan = Plan.model_validate(
        {
            "name": "t",
            "model": {"name": "tiny", "quantization": quantization},
            "adapter": {"rank": 3, "alpha": 6},
            "algorithm": {"name": "flora"},
            "train": {"steps": 2, "batch_size": 4, "precision": "fp32", "learning_rate": 0.01, "optimizer": "sgd"},
            "deepspeed": {"zero_stage": stage},
            "data": {"template": "plain", "max_length": 24, "validation_fraction": 0.2},
        }
    )
    session = Session(lambda: alone, lambda _: None, lambda: False)
    session.carry_out(Prepare(run_id="r", plan=plan, model=tiny_model, data=tiny_rows, role="site"))
    session.carry_out(Build(adapter=tmp_path / "zero"))
    zero = read_tensors(tmp_path / "zero")
    torch.manual_seed(1)
    trained = {name: value + 0.2 * torch.randn_like(value) for name, value in zero.items()}
    # The same as two entries of a ledger, under a LoRA that adds nothing.
    entries: dict[str, torch.Tensor] = {}
    for name, value in trained.items():
        if name.endswith(".lora_B.weight"):
            module = name.removesuffix(".lora_B.weight")
            a = trained[f"{module}.lora_A.weight"]
            for entry, rows in (("00001", slice(0, 1)), ("00002", slice(1, 3))):
                entries[f"base_delta/{entry}/{module}.lora_U"] = 2.0 * value[:, rows].contiguous()
                entries[f"base_delta/{entry}/{module}.lora_V"] = a[rows].contiguous()
    write_tensors(tmp_path / "as-lora", trained)
    write_tensors(tmp_path / "as-ledger", {**zero, **entries})

    def loss(adapter: str) -> float:
        return session.carry_out(Evaluate(adapter=tmp_path / adapter)).metrics["loss"]

    before = weights(session._run.engine.model)
    expected = loss("as-lora")
    assert loss("as-ledger") == pytest.approx(expected, rel=1e-5)
    assert abs(loss("zero") - expected) > 1e-3 * expected  # a version without a ledger takes it away again
    # And it is what the next round is trained on: nothing of the ledger is in the delta, all of it in the loss.
    session.carry_out(Train(round=3, base=tmp_path / "as-ledger", delta=tmp_path / "delta"))
    assert read_tensors(tmp_path / "delta").keys() == zero.keys()
    assert loss("as-ledger") == pytest.approx(expected, rel=1e-5)
    assert weights(session._run.engine.model) == before


def test_a_base_in_four_bits_with_a_ledger_is_exactly_their_sum(tiny_model: Path) -> None:
    """Folded into the base, the ledger would be rounded to one of 16 values a weight. It stays beside it."""
    functional = pytest.importorskip("bitsandbytes").functional
    plan = Plan.model_validate({"name": "t", "model": {"name": "tiny"}, "adapter": {"rank": 3}})
    model = attach(plan, load_model(tiny_model, torch.float32, "nf4")).eval()
    exact = attach(plan, load_model(tiny_model, torch.float32)).eval()
    random = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, model.config.vocab_size, (2, 16), generator=random)
    entries: dict[str, torch.Tensor] = {}
    with torch.no_grad():
        for name, module in model.named_modules():
            if not name.endswith(".base_layer"):
                continue
            held, adapted = module.weight, name.removesuffix(".base_layer")
            assert held.dtype == torch.uint8
            whole = functional.dequantize_4bit(held.data, held.quant_state)
            # Smaller than what four bits can tell: a base that is quantised anew would lose it.
            wide = 0.01 * torch.randn((whole.shape[0], 2), generator=random)
            tall = torch.randn((2, whole.shape[1]), generator=random)
            entries[f"base_delta/00001/{adapted}.lora_U"] = wide
            entries[f"base_delta/00001/{adapted}.lora_V"] = tall
            exact.get_submodule(name).weight.copy_(whole + wide @ tall)
        before, without = weights(model), model(tokens).logits
        ledger = BaseDelta(model, torch.device("cpu"))
        ledger.install(entries)
        found, wanted = model(tokens).logits, exact(tokens).logits
        assert entries
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
        assert float((without - wanted).abs().max()) > 0.01
        assert weights(model) == before
        ledger.install({})
        assert torch.equal(model(tokens).logits, without)
