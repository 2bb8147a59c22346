"""Federated DPO: its rows, its loss and gradient against plain torch, its reference, and that training works."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from fsllm_client.data.batches import TrainingBatches
from fsllm_client.data.rows import Example, Place, example_from_record
from fsllm_client.data.site_data import load_site_data
from fsllm_client.data.splits import content_key
from fsllm_client.trainer.adapters import adapter_parameters, attach
from fsllm_client.trainer.base_model import load_model, load_tokenizer
from fsllm_client.trainer.group import Group
from fsllm_client.trainer.orders import Build, Evaluate, Finished, Prepare, Train
from fsllm_client.trainer.session import Session
from fsllm_client.trainer.tensor_files import read_tensors, write_tensors
from fsllm_common.errors import DataInvalid
from fsllm_common.plan import Plan
from fsllm_common.plan.schema import Data

pytestmark = pytest.mark.filterwarnings("ignore")

BETA = 0.3
PREFERENCE = Data(format="preference")
HERE = Place(Path("rows.jsonl"), 7)


def _plan(**sections: dict[str, Any]) -> Plan:
    return Plan.model_validate(
        {
            "name": "t",
            "seed": 4,
            "model": {"name": "tiny"},
            "adapter": {"rank": 3, **sections.get("adapter", {})},
            "algorithm": {"name": "dpo", "parameters": {"beta": BETA}},
            "train": {
                "steps": 2,
                "batch_size": 5,
                "precision": "fp32",
                "learning_rate": 0.02,
                **sections.get("train", {}),
            },
            "deepspeed": sections.get("deepspeed", {}),
            "data": {
                "format": "preference",
                "template": "plain",
                "packing": False,
                "max_length": 24,
                "validation_fraction": 0.3,
            },
            "evaluate": {"metrics": ["loss", "reward_accuracy"]},
        }
    )


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows whose chosen answer is of digits and whose rejected one is of letters, of different lengths."""
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    rows = [
        {
            "prompt": f"{'abcdefg'[i % 7] * (1 + i % 3)}=",
            "chosen": str(i % 5) * (1 + i % 4),
            "rejected": "xyz"[i % 3] * 2,
        }
        for i in range(30)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


class Site:
    def __init__(self, folder: Path, plan: Plan, group: Group, model: Path, rows: Path) -> None:
        folder.mkdir(exist_ok=True)
        self.folder, self.group = folder, group
        self.session = Session(lambda: group, lambda _: None, bool)
        self.session.carry_out(Prepare(run_id="r", plan=plan, model=model, data=rows, role="site"))
        self.base = folder / "0.safetensors"
        self.session.carry_out(Build(adapter=self.base))

    def train(self, base: Path) -> tuple[dict[str, torch.Tensor], Finished]:
        delta = self.folder / "delta.safetensors"
        done = self.session.carry_out(Train(round=1, base=base, delta=delta))
        return read_tensors(delta), done

    def moved(self, seed: int = 1) -> Path:
        """A version whose adapter is not the base model's equal."""
        generator, path = torch.Generator().manual_seed(seed), self.folder / "moved.safetensors"
        tensors = read_tensors(self.base)
        write_tensors(path, {n: t + 0.1 * torch.randn(t.shape, generator=generator) for n, t in tensors.items()})
        return path


def _log_probability(model: torch.nn.Module, encoded: Any) -> torch.Tensor:  # noqa: ANN401
    """By hand: one sequence, one token after the other."""
    ids = torch.tensor(encoded.input_ids.astype("int64"))[None]
    scores = torch.log_softmax(model(input_ids=ids).logits[0].float(), -1)
    return sum(
        (scores[at - 1, int(ids[0, at])] for at, label in enumerate(encoded.labels) if label != -100),
        start=torch.zeros(()),
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "prompt"])
@pytest.mark.parametrize("micro", [None, 2])
def test_a_step_is_plain_torchs_on_the_papers_loss(
    kind: str, micro: int | None, tmp_path: Path, alone: Group, tiny_model: Path, pairs: Path
) -> None:
    rate = 0.5
    plan = _plan(
        adapter={"kind": kind, "virtual_tokens": 4},
        train={"optimizer": "sgd", "learning_rate": rate, "max_grad_norm": 0.0, "steps": 2, "micro_batch_size": micro},
    )
    site = Site(tmp_path, plan, alone, tiny_model, pairs)
    start = site.moved()
    delta, done = site.train(start)

    data = load_site_data(pairs, plan, load_tokenizer(tiny_model), "site")
    bare = load_model(tiny_model, torch.float32).eval()
    model = attach(plan, load_model(tiny_model, torch.float32)).train()
    parameters = adapter_parameters(model)
    tensors = read_tensors(start)
    for name, parameter in parameters.items():
        parameter.data.copy_(tensors[name])
    batches = TrainingBatches([(one,) for one in data.train], packed=False, batch_size=5, pad=2, seed=4, round_number=1)
    sums, count = 0.0, 0
    for step, _ in zip(batches, range(2), strict=False):
        chosen = [pair for batch in step.micro_batches for pair in batch.pairs]
        losses = []
        for pair in chosen:
            gains = []
            for side in (pair, pair.rejected):
                with torch.no_grad():
                    before = _log_probability(bare, side)
                if kind == "prompt":  # PEFT puts the virtual tokens in front
                    width = len(side.input_ids)
                    ids = torch.tensor(side.input_ids.astype("int64"))[None]
                    scores = torch.log_softmax(model(input_ids=ids).logits[0, -width:].float(), -1)
                    after = sum(
                        scores[at - 1, int(ids[0, at])] for at, label in enumerate(side.labels) if label != -100
                    )
                else:
                    after = _log_probability(model, side)
                gains.append(after - before)
            losses.append(torch.log1p(torch.exp(-BETA * (gains[0] - gains[1]))))
        loss = torch.stack(losses).mean()
        gradients = torch.autograd.grad(loss, list(parameters.values()))
        with torch.no_grad():
            for parameter, gradient in zip(parameters.values(), gradients, strict=True):
                parameter -= rate * gradient
        sums, count = sums + float(torch.stack(losses).sum()), count + len(losses)
    for name, parameter in parameters.items():
        assert torch.allclose(delta[name], parameter.detach() - tensors[name], atol=2e-6), name
    assert max(float(tensor.abs().max()) for tensor in delta.values()) > 1e-3
    assert done.metrics["train_loss"] == pytest.approx(sums / count, rel=1e-5)
    assert done.counts == {"examples": len(data.train), "tokens": 10, "steps": 2}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "dora", "ia3", "vera", "prefix"])
def test_the_reference_is_the_base_model_whatever_the_adapter_holds_and_is_computed_once(
    kind: str, tmp_path: Path, alone: Group, tiny_model: Path, pairs: Path
) -> None:
    site = Site(tmp_path, _plan(adapter={"kind": kind, "virtual_tokens": 4}), alone, tiny_model, pairs)
    site.session.carry_out(Evaluate(adapter=site.moved()))
    run = site.session._run
    known = run.engine.reference._known
    assert len(known) == len(run.data.validation) > 3
    bare = load_model(tiny_model, torch.float32).eval()
    with torch.no_grad():
        for pair, found in known.items():
            expected = [float(_log_probability(bare, side)) for side in (pair, pair.rejected)]
            assert found == pytest.approx(expected, rel=1e-5)
    before = dict(known)
    site.session.carry_out(Evaluate(adapter=site.moved(2)))
    assert dict(known) == before
    site.train(site.base)
    calls: list[int] = []
    run.engine.model.register_forward_pre_hook(lambda *_: calls.append(1))
    site.train(site.base)
    assert len(calls) == 2, "a step is one forward pass when the reference is known"


@pytest.mark.slow
@pytest.mark.parametrize("deepspeed", [{"zero_stage": 2}, {"zero_stage": 3}])
def test_training_raises_the_margin_from_nothing(
    deepspeed: dict[str, Any], tmp_path: Path, alone: Group, tiny_model: Path, pairs: Path
) -> None:
    plan = _plan(deepspeed=deepspeed, train={"steps": 12, "micro_batch_size": 2, "batch_size": 6})
    site = Site(tmp_path, plan, alone, tiny_model, pairs)
    before = site.session.carry_out(Evaluate(adapter=site.base))
    assert before.metrics["loss"] == pytest.approx(math.log(2), rel=1e-6), "version 0 prefers nothing"
    assert before.metrics["reward_accuracy"] == 0
    delta, _ = site.train(site.base)
    trained = tmp_path / "1.safetensors"
    start = read_tensors(site.base)
    write_tensors(trained, {name: start[name] + delta[name] for name in start})
    after = site.session.carry_out(Evaluate(adapter=trained))
    assert after.metrics["loss"] < before.metrics["loss"] - 0.05
    assert after.metrics["reward_accuracy"] > 0.8
    assert after.counts == {"examples": len(site.session._run.data.validation), "tokens": before.counts["examples"]}


def _example(**record: object) -> Example:
    return example_from_record(record, "preference", PREFERENCE, HERE)


def test_rows_may_be_text_or_messages() -> None:
    plain = _example(prompt="p", chosen="good", rejected="bad")
    messages = [{"role": "user", "content": "p"}]
    spoken = _example(prompt=messages, chosen=[{"role": "assistant", "content": "good"}], rejected="bad")
    assert plain == spoken
    assert [(side.turns[-1].content, side.rejected) for side in plain.sides] == [("good", None), ("bad", None)]
    assert [side.turns[0].content for side in plain.sides] == ["p", "p"]


@pytest.mark.parametrize("missing", ["prompt", "chosen", "rejected"])
def test_a_row_that_lacks_a_side_is_named_by_its_place_alone(missing: str) -> None:
    record = {"prompt": "secret", "chosen": "secret", "rejected": "secret"}
    with pytest.raises(DataInvalid, match=f"rows.jsonl, line 7: the field '{missing}' is missing") as caught:
        _example(**{**record, missing: None})
    assert "secret" not in str(caught.value)
    with pytest.raises(DataInvalid, match="'chosen' is not one message of the assistant"):
        _example(**{**record, "chosen": [{"role": "user", "content": "secret"}]})


def test_another_rejected_answer_makes_another_row_and_others_keep_their_side() -> None:
    one, other = (_example(prompt="p", chosen="good", rejected=word) for word in ("bad", "worse"))
    assert one != other
    assert content_key(one, 3) != content_key(other, 3)
    completion = example_from_record({"prompt": "p", "completion": "good"}, "completion", Data(), HERE)
    # As it was before there were preferences, or rows would change sides in a run that goes on.
    assert content_key(completion, 3) == 8106287997654417164


def test_only_the_last_answer_counts_and_pairs_without_two_of_them_are_left_out(
    tiny_model: Path, tmp_path: Path
) -> None:
    talk = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    rows = [
        {"prompt": talk, "chosen": "yes", "rejected": "no"},
        {"prompt": "p", "chosen": "yes", "rejected": " "},
        {"prompt": "p" * 40, "chosen": "yes", "rejected": "no"},
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = load_tokenizer(tiny_model)
    data = load_site_data(path, _plan(), tokenizer, "evaluator")
    (pair,) = data.validation
    said = [tokenizer.decode([t for t in side.labels if t != -100]) for side in pair.sides]
    assert said == ["yes</s>", "no</s>"]
    assert pair.answer_tokens == 1
    assert data.counts["skipped_rows"] == 2
    assert data.notes[:2] == (
        "1 rows have no answer and were skipped.",
        "1 rows were skipped: the prompt alone fills data.max_length = 24 tokens.",
    )
