"""A site in plain torch: the tiny model and the site's data, without DeepSpeed and without this project's loop."""

import contextlib
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rules_site import Tensors

from fsllm_client.data.batches import Step, TrainingBatches, evaluation_batches
from fsllm_client.data.packing import arrange
from fsllm_client.data.site_data import load_site_data
from fsllm_client.trainer.adapters import adapter_parameters, attach
from fsllm_client.trainer.answers import token_losses
from fsllm_client.trainer.base_model import load_model, load_tokenizer
from fsllm_common.plan import Plan


class Site:
    """The tiny model, and its site's data, in plain torch."""

    def __init__(self, plan: Plan, folder: Path, rows: Path) -> None:
        self.model = attach(plan, load_model(folder, torch.float32)).train()
        self.parameters = adapter_parameters(self.model)
        data = load_site_data(rows, plan, load_tokenizer(folder), "site")
        tokens = b"".join(example.input_ids.astype("<i8").tobytes() for example in data.train)
        self.number = int.from_bytes(hashlib.blake2b(tokens, digest_size=8).digest(), "little")
        self.sequences = arrange(data.train, packed=False, max_length=24, seed=11)
        self.validation = data.validation[:2]

    def batches(self, round_: int) -> Iterator[Step]:
        return iter(TrainingBatches(self.sequences, packed=False, batch_size=6, pad=2, seed=11, round_number=round_))

    def gradient(self, at: Tensors, step: Step) -> Tensors:
        for parameter in self.parameters.values():
            parameter.grad = None
        self._mean_loss(at, step).backward()
        return {name: parameter.grad.clone() for name, parameter in self.parameters.items()}

    def loss(self, at: Tensors, step: Step) -> float:
        with torch.no_grad():
            return float(self._mean_loss(at, step))

    def validation_loss(self, at: Tensors) -> float:
        (batch,) = evaluation_batches(self.validation, batch_size=2, pad=2)
        return self.loss(at, Step((batch,), batch.answer_tokens, 0, 2))

    @contextlib.contextmanager
    def mixing(self, gates: Tensors, rest: Tensors) -> Iterator[None]:
        """Replace each LoRA layer's forward pass by the mixture's."""
        layers = {n: self.model.get_submodule(n.removesuffix(".lora_A.weight")) for n in gates}
        before = {n: layer.forward for n, layer in layers.items()}
        for n, layer in layers.items():

            def forward(x: torch.Tensor, n: str = n, layer: Any = layer) -> torch.Tensor:  # noqa: ANN401
                a = torch.exp(x @ gates[n].T)
                share = a[..., 0:1] / a.sum(-1, keepdim=True)
                own = x @ layer.lora_A["default"].weight.T @ layer.lora_B["default"].weight.T
                others = x @ rest[n].T @ rest[n.replace("lora_A", "lora_B")].T
                return layer.base_layer(x) + layer.scaling["default"] * (share * own + (1 - share) * others)

            layer.forward = forward
        yield
        for n, layer in layers.items():
            layer.forward = before[n]

    def _mean_loss(self, at: Tensors, step: Step) -> torch.Tensor:
        for name, parameter in self.parameters.items():
            parameter.data.copy_(at[name])
        (batch,) = step.micro_batches
        inputs = dict(batch.inputs)
        labels = inputs.pop("labels")
        return token_losses(self.model(**inputs).logits, labels) / int((labels != -100).sum())
