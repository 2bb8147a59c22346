"""The plain Trainer of transformers, with PEFT and DeepSpeed, as anyone would write it."""

from __future__ import annotations

import os
import socket
import time
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from fsllm_bench.training.setting import Setting

if TYPE_CHECKING:
    from peft import PeftModel


def serve(setting: Setting, turns: Connection, order: int = 0) -> None:
    """Train pass after pass over the rows; wait for a turn before each, and answer with its seconds.

    Every answer is (seconds, path of the adapter after the pass). Each ``order`` shuffles the rows in its own way.
    """
    _alone()
    import torch
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
    from safetensors.torch import load_file, save_file
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        DataCollatorForSeq2Seq,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    from fsllm_client.data.site_data import load_site_data
    from fsllm_client.trainer.cpu_adam import build

    plan = setting.plan
    build()
    tokenizer = AutoTokenizer.from_pretrained(setting.model)
    rows = [
        {"input_ids": row.input_ids.tolist(), "labels": row.labels.tolist()}
        for row in load_site_data(setting.data, plan, tokenizer, "site").train
    ]
    dtype = torch.bfloat16 if plan.train.precision == "bf16" else torch.float32
    model: PeftModel = get_peft_model(
        AutoModelForCausalLM.from_pretrained(setting.model, dtype=dtype),
        LoraConfig(
            task_type="CAUSAL_LM", r=plan.adapter.rank, lora_alpha=plan.adapter.alpha, target_modules="all-linear"
        ),
    )
    set_peft_model_state_dict(model, load_file(turns.recv()))

    class Turns(TrainerCallback):  # type: ignore[misc]  # transformers is not typed here
        """Waits for the other side between passes."""

        def on_epoch_begin(self, *_: Any, **__: Any) -> None:  # noqa: ANN401
            turns.recv()
            self.began = time.monotonic()

        def on_epoch_end(self, args: Any, state: Any, *_: Any, **__: Any) -> None:  # noqa: ANN401
            seconds = time.monotonic() - self.began
            path = setting.folder / f"plain-{round(state.epoch)}.safetensors"
            adapter = get_peft_model_state_dict(model)
            save_file({name: tensor.float().cpu().contiguous() for name, tensor in adapter.items()}, path)
            turns.send((seconds, path))

    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(setting.folder / "plain"),
            per_device_train_batch_size=setting.examples_a_step,
            num_train_epochs=setting.passes,
            learning_rate=plan.train.learning_rate,
            lr_scheduler_type="constant",
            weight_decay=plan.train.weight_decay,
            max_grad_norm=plan.train.max_grad_norm,
            bf16=plan.train.precision == "bf16",
            seed=plan.seed,
            data_seed=plan.seed + order,
            deepspeed=deepspeed_config(setting),
            save_strategy="no",
            report_to=[],
            use_cpu=not torch.cuda.is_available(),
        ),
        train_dataset=rows,
        data_collator=DataCollatorForSeq2Seq(tokenizer, padding=True),
        callbacks=[Turns()],
    )
    trainer.train()


def deepspeed_config(setting: Setting) -> dict[str, Any]:
    """Return the client's DeepSpeed configuration, with what the Trainer must be told: its batch and its optimizer."""
    import torch

    from fsllm_client.trainer.ds_config import deepspeed_config as ours

    plan = setting.plan
    config = ours(plan, world=1, device="cuda" if torch.cuda.is_available() else "cpu", clip=True)
    config["train_micro_batch_size_per_gpu"] = setting.examples_a_step
    config["optimizer"] = {
        "type": "AdamW",
        "params": {
            "lr": plan.train.learning_rate,
            "weight_decay": plan.train.weight_decay,
            "betas": [0.9, 0.999],
            "eps": 1e-8,
        },
    }
    return config


def _alone() -> None:
    """Set what torchrun would for a single process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
