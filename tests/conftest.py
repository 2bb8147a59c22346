"""What tests of several kinds share: a tiny model to fine-tune, made here, and rows to train it on."""

import json
import os
import string
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from fsllm_client.trainer.cpu_adam import default_folder

if TYPE_CHECKING:
    from fsllm_client.trainer.group import Group

# What the supervisor sets for a worker, for tests that train in this process; all before torch is imported.
for name, value in {
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "HF_HUB_OFFLINE": "1",
    "DS_ACCELERATOR": "cpu",
    "TORCH_EXTENSIONS_DIR": str(default_folder()),
}.items():
    os.environ.setdefault(name, value)
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])


@pytest.fixture(scope="session")
def extensions() -> Path:
    """Where DeepSpeed keeps what it compiles, from one run of the tests to the next."""
    return Path(os.environ["TORCH_EXTENSIONS_DIR"])


@pytest.fixture(scope="session")
def alone() -> "Group":
    """This process as the only rank, on the CPU, with DeepSpeed's operators compiled."""
    from fsllm_client.trainer.cpu_adam import build
    from fsllm_client.trainer.group import join

    build()
    return join(0, 1)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random Llama of 25 thousand parameters (float32) and a tokenizer of one token a byte.

    Its hidden size is odd, so that two ranks do not divide its adapters evenly.
    """
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny") / "model"
    words = ["<s>", "</s>", "<pad>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        config = LlamaConfig(
            vocab_size=len(words),
            hidden_size=45,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=3,
            num_key_value_heads=1,
            head_dim=8,
            max_position_embeddings=256,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=2,
        )
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of 40 prompt/completion rows, of different lengths."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    letters = string.ascii_lowercase
    rows = [{"prompt": f"{letters[i % 26] * (1 + i % 4)}=", "completion": str(i % 7) * (1 + i % 3)} for i in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
