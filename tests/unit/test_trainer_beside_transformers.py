"""A round against transformers' Trainer with PEFT: the same adapter and loss after the same examples."""

from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model_state_dict
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

from fsllm_client.data.batches import TrainingBatches
from fsllm_client.data.packing import arrange
from fsllm_client.data.site_data import load_site_data
from fsllm_client.trainer.adapters import adapter_parameters, attach
from fsllm_client.trainer.base_model import load_model, load_tokenizer
from fsllm_client.trainer.group import Group
from fsllm_client.trainer.orders import Build, Evaluate, Prepare, Train
from fsllm_client.trainer.session import Session
from fsllm_client.trainer.tensor_files import read_tensors, write_tensors
from fsllm_common.plan import Plan

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

STEPS, RATE = 6, 0.01


class InOrder(Trainer):
    """Takes the examples as they come."""

    def _get_train_sampler(self, *_: object) -> torch.utils.data.Sampler[int]:
        return torch.utils.data.SequentialSampler(self.train_dataset)


def test_the_adapter_and_the_loss_are_those_of_the_plain_trainer(
    tmp_path: Path, alone: Group, tiny_model: Path, tiny_rows: Path
) -> None:
    plan = Plan.model_validate(
        {
            "name": "t",
            "seed": 11,
            "model": {"name": "tiny"},
            "adapter": {"rank": 3},
            "train": {"steps": STEPS, "batch_size": 4, "precision": "fp32", "learning_rate": RATE},
            "data": {"template": "plain", "max_length": 24, "validation_fraction": 0.2},
            "evaluate": {"metrics": ["loss"]},
        }
    )
    session = Session(lambda: alone, lambda report: None, lambda: False)
    session.carry_out(Prepare(run_id="r", plan=plan, model=tiny_model, data=tiny_rows, role="site"))
    base, delta = tmp_path / "base.safetensors", tmp_path / "delta.safetensors"
    session.carry_out(Build(adapter=base))
    session.carry_out(Train(round=1, base=base, delta=delta))
    start, change = read_tensors(base), read_tensors(delta)
    ours = {name: start[name] + change[name] for name in start}

    # The same examples in the same steps, not packed but padded. Steps of packed sequences hold different numbers.
    tokenizer = load_tokenizer(tiny_model)
    train = load_site_data(tiny_rows, plan, tokenizer, "site").train
    packed = arrange(train, packed=True, max_length=24, seed=plan.seed)
    steps = list(islice(TrainingBatches(packed, packed=True, batch_size=4, pad=2, seed=11, round_number=1), STEPS))
    examples = [_examples(step.micro_batches[0].inputs) for step in steps]
    assert [len(step) for step in examples] == [step.examples for step in steps]
    assert max(map(len, examples)) > 4
    model = attach(plan, load_model(tiny_model, torch.float32))
    with torch.no_grad():
        for name, parameter in adapter_parameters(model).items():
            parameter.copy_(start[name])
    optimizer = torch.optim.AdamW(adapter_parameters(model).values(), lr=RATE, weight_decay=0.0)
    for number, step in enumerate(examples):
        # A Trainer a step, around one optimizer: its batches have one size.
        InOrder(
            model=model,
            args=TrainingArguments(
                output_dir=str(tmp_path / "plain"),
                per_device_train_batch_size=len(step),
                max_steps=1,
                learning_rate=RATE,
                lr_scheduler_type="constant",
                max_grad_norm=plan.train.max_grad_norm,
                save_strategy="no",
                report_to=[],
                use_cpu=True,
                seed=number,
            ),
            train_dataset=step,
            data_collator=DataCollatorForSeq2Seq(tokenizer, padding=True),
            optimizers=(optimizer, None),
        ).train()
    theirs = {name: tensor.float() for name, tensor in get_peft_model_state_dict(model).items()}

    assert theirs.keys() == ours.keys()
    moved = max(float(tensor.abs().max()) for tensor in change.values())
    assert moved > 3 * RATE
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=0.01 * moved, msg=lambda m, n=name: f"{n}: {m}")
    losses = []
    for tensors in (start, ours, theirs):
        path = tmp_path / "measured.safetensors"
        write_tensors(path, {name: tensor.contiguous() for name, tensor in tensors.items()})
        losses.append(session.carry_out(Evaluate(adapter=path)).metrics["loss"])
    before, after, plain = losses
    assert after < before - 0.05
    assert after == pytest.approx(plain, abs=0.01 * (before - after))


def _examples(inputs: dict[str, Any]) -> list[dict[str, list[int]]]:
    """Take a packed batch apart: an example begins where positions do; one without labels is padding."""
    found = []
    for ids, labels, positions in zip(inputs["input_ids"], inputs["labels"], inputs["position_ids"], strict=True):
        begins = [*(positions == 0).nonzero().flatten().tolist(), len(ids)]
        for begin, end in pairwise(begins):
            if bool((labels[begin:end] != -100).any()):
                found.append({"input_ids": ids[begin:end].tolist(), "labels": labels[begin:end].tolist()})
    return found
