"""Makes the packaged model: a tokenizer and a small Llama trained from scratch on `corpus`.

One core, about a quarter of an hour; the same seed and versions give the same files:

    python -m fsllm_bench.embedded.pretrain --out DIR --seed 0
"""

import argparse
import json
import logging
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM

from fsllm_bench.embedded.corpus import ADVICE, documents

__all__ = ["Recipe", "main", "make_model", "make_tokenizer"]

BEGIN: Final = "<s>"
END: Final = "</s>"
PAD: Final = "<pad>"
_SPECIAL: Final = (BEGIN, END, PAD)  # the trainer gives them the first identifiers, in this order

# Prompt headers as they are commonly written, without anything asked or answered. They are
# only counted by the tokenizer, so that a prompt costs few tokens; the model never reads them.
_HEADERS: Final = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n",
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n",
    "### Instruction:\n",
    "\n\n### Input:\n",
    "\n### Response:\n",
    "\n\n### Response:\n",
)

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what the model becomes, besides the corpus."""

    seed: int = 0
    vocabulary: int = 1500
    hidden: int = 128
    layers: int = 5
    heads: int = 4
    intermediate: int = 384
    context: int = 256
    steps: int = 1900
    batch: int = 8
    learning_rate: float = 4e-3
    warmup: int = 100
    weight_decay: float = 0.05


def make_tokenizer(recipe: Recipe) -> Tokenizer:
    """Train a byte-level BPE on a part of the corpus, with more of its advice, and on headers."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocabulary,
        special_tokens=list(_SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [*documents(recipe.seed, 20_000), *(_HEADERS * 300), *(ADVICE * 100)]
    bpe.train_from_iterator(texts, trainer)
    return bpe


def _batches(recipe: Recipe, tokenizer: Tokenizer) -> Iterator[torch.Tensor]:
    """Yield [batch, context] tokens, every row beginning with a new document.

    Every other document begins with `<s>`, so that a prompt may be given with or without it.
    """
    begin, end = _SPECIAL.index(BEGIN), _SPECIAL.index(END)
    texts = enumerate(documents(recipe.seed + 1))
    while True:
        rows = []
        for _ in range(recipe.batch):
            row: list[int] = []
            while len(row) < recipe.context:
                index, text = next(texts)
                row += [begin] * (index % 2) + tokenizer.encode(text).ids + [end]
            rows.append(row[: recipe.context])
        yield torch.tensor(rows)


def _rate(recipe: Recipe, step: int) -> float:
    """Rise linearly, then fall along a cosine to a twentieth."""
    if step < recipe.warmup:
        return (step + 1) / recipe.warmup
    done = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    return 0.05 + 0.95 * 0.5 * (1.0 + math.cos(math.pi * done))


def make_model(recipe: Recipe, tokenizer: Tokenizer) -> LlamaForCausalLM:
    """Train the model from scratch and return it in float32, logging the progress."""
    torch.manual_seed(recipe.seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=tokenizer.get_vocab_size(),
            hidden_size=recipe.hidden,
            intermediate_size=recipe.intermediate,
            num_hidden_layers=recipe.layers,
            num_attention_heads=recipe.heads,
            num_key_value_heads=recipe.heads,
            max_position_embeddings=recipe.context,
            tie_word_embeddings=True,
            bos_token_id=_SPECIAL.index(BEGIN),
            eos_token_id=_SPECIAL.index(END),
            pad_token_id=_SPECIAL.index(PAD),
        )
    )
    decayed = [weight for weight in model.parameters() if weight.dim() > 1]
    kept = [weight for weight in model.parameters() if weight.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": recipe.weight_decay},
            {"params": kept, "weight_decay": 0.0},
        ],
        lr=recipe.learning_rate,
        betas=(0.9, 0.98),
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(recipe, step))
    batches = _batches(recipe, tokenizer)
    model.train()
    started = time.monotonic()
    mean = 0.0
    for step in range(1, recipe.steps + 1):
        tokens = next(batches)
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        mean += (loss.item() - mean) / min(step, 50)
        if step % 50 == 0 or step == recipe.steps:
            _log.info(
                "step %d of %d, loss %.3f, %.0f s",
                step, recipe.steps, mean, time.monotonic() - started,
            )  # fmt: skip
    return model


def _save_tokenizer(tokenizer: Tokenizer, recipe: Recipe, directory: Path) -> None:
    """Write the tokenizer's two files, so that transformers of version 4 and of 5 load it."""
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BEGIN,
        "eos_token": END,
        "pad_token": PAD,
        "model_max_length": recipe.context,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(f"{json.dumps(settings, indent=2)}\n", encoding="utf-8")


def _card(recipe: Recipe, parameters: int) -> str:
    return f"""---
license: apache-2.0
language: en
library_name: transformers
---

# The embedded model of fsllm

A Llama of {parameters:,} parameters ({recipe.layers} layers of {recipe.hidden}, tied embeddings,
context {recipe.context}, a byte-level BPE of {recipe.vocabulary} tokens, weights in bfloat16). It
knows a small generated world: opposites, categories, plurals, the letters of short words,
which clinic sees which complaint, and arithmetic with small numbers. It exists so that
federated fine-tuning can be shown and tested in seconds on a CPU, without a download. It is
of no use for anything else, and what it says about clinics is no medical advice.

## How it was made

    python -m fsllm_bench.embedded.pretrain --out DIR --seed {recipe.seed}

From random weights, {recipe.steps} steps of {recipe.batch} x {recipe.context} tokens of text that
`fsllm_bench/embedded/corpus.py` generates. No text and no weights of others went into it.
The text holds none of the tasks' instructions, and the model as it is answers none; a LoRA
adapter of rank 8 brings the skills out within some tens of steps.

Load it in float32 (`dtype=torch.float32`) to train it. Prompts work with `<s>` and without;
an answer ends with `</s>`.

Licence: Apache-2.0, as the rest of the project.
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Train the tokenizer and the model, and write the folder that `model_path` names."""
    parser = argparse.ArgumentParser(description="Make the embedded model of fsllm.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--seed", type=int, default=Recipe.seed, help="decides every draw")
    parser.add_argument("--steps", type=int, default=Recipe.steps, help="training steps")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)  # one order of summation, so that a seed means one model
    recipe = Recipe(seed=options.seed, steps=options.steps)
    tokenizer = make_tokenizer(recipe)
    model = make_model(recipe, tokenizer)
    model.bfloat16()
    model.save_pretrained(options.out)
    (options.out / "model.safetensors").chmod(0o644)  # it is written for its owner only
    _save_tokenizer(tokenizer, recipe, options.out)
    card = _card(recipe, sum(weight.numel() for weight in model.parameters()))
    (options.out / "README.md").write_text(card, encoding="utf-8")
    _log.info("wrote %s", options.out)


if __name__ == "__main__":
    main()
