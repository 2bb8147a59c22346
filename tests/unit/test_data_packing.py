"""Packed and unpacked examples have one and the same loss and gradient, in the models that packing is used with."""

from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from fsllm_client.data.batches import Batch, collate
from fsllm_client.data.packing import adapter_allows_packing, arrange, keeps_examples_apart, pack
from fsllm_client.data.tokenise import IGNORED, Encoded
from fsllm_common.plan.combinations import PROMPT_KINDS
from fsllm_common.plan.schema import AdapterKind

VOCABULARY = 61
PAD = 0


def example(length: int, seed: int = 0, prompt: int | None = None) -> Encoded:
    random = np.random.default_rng([length, seed])
    ids = random.integers(1, VOCABULARY, length).astype(np.int32)
    labels = ids.copy()
    labels[: max(1, length // 2 if prompt is None else prompt)] = IGNORED
    return Encoded(ids, labels, 0, None)


def llama(attention: str, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,  # far from uniform attention, so that a leak would show
        attn_implementation=attention,
    )
    assert config.use_cache  # the default, under which transformers would not look for packed examples
    return LlamaForCausalLM(config).to(dtype)


def summed_loss(model: LlamaForCausalLM, batch: Batch, **changed: object) -> torch.Tensor:
    loss: torch.Tensor = model(**{**batch.inputs, **changed}, num_items_in_batch=1).loss
    return loss


def gradients(model: LlamaForCausalLM, *losses: torch.Tensor) -> torch.Tensor:
    found = torch.autograd.grad(torch.stack(losses).sum(), list(model.parameters()))
    return torch.cat([gradient.flatten() for gradient in found])


# Prompts of one token and of none: then a label stands right at the border between two examples.
EXAMPLES = [example(9), example(5, prompt=1), example(12, prompt=0), example(3, seed=1), example(7, prompt=0)]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_packed_loss_and_gradient_are_those_of_the_examples_alone(attention: str) -> None:
    model = llama(attention)
    rows = pack(EXAMPLES, 20, seed=1)
    assert len(rows) == 2
    assert max(len(row) for row in rows) >= 3
    packed = collate(rows, pad=PAD, packed=True)
    alone = [collate([(one,)], pad=PAD, packed=False) for one in EXAMPLES]
    padded = collate([(one,) for one in EXAMPLES], pad=PAD, packed=False)

    assert packed.answer_tokens == padded.answer_tokens == sum(one.answer_tokens for one in alone)
    loss_packed = summed_loss(model, packed)
    losses_alone = [summed_loss(model, one) for one in alone]
    loss_padded = summed_loss(model, padded)
    torch.testing.assert_close(loss_packed, torch.stack(losses_alone).sum(), rtol=1e-5, atol=0)
    torch.testing.assert_close(loss_padded, loss_packed, rtol=1e-5, atol=0)

    of_packed, of_alone = gradients(model, loss_packed), gradients(model, *losses_alone)
    torch.testing.assert_close(of_packed, of_alone, rtol=1e-3, atol=1e-5 * float(of_alone.abs().max()))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_plain_causal_mask_would_leak(attention: str) -> None:
    """The control: each of the three things that ``collate`` sees to matters to the loss."""
    model = llama(attention)
    packed = collate(pack(EXAMPLES, 20, seed=1), pad=PAD, packed=True)
    right = float(summed_loss(model, packed).detach())
    leaks: dict[str, dict[str, object]] = {
        "positions that run through": {"position_ids": None},
        "an attention mask": {"attention_mask": torch.ones_like(packed.inputs["input_ids"])},
        "a label at the border": {"labels": packed.inputs["labels"].masked_fill(packed.inputs["position_ids"] == 0, 5)},
    }
    for what, changed in leaks.items():
        # A hundred times the tolerance under which packed and unpacked are equal.
        assert abs(float(summed_loss(model, packed, **changed).detach()) - right) > 1e-3 * right, what


def test_what_stands_in_a_batch() -> None:
    first, second, third = example(4), example(2), example(3)
    packed = collate([(first, second), (third,)], pad=PAD, packed=True)
    assert packed.inputs["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1], [0, 1, 2, 0, 1, 2]]
    assert packed.inputs["input_ids"].tolist() == [
        [*first.input_ids.tolist(), *second.input_ids.tolist()],
        [*third.input_ids.tolist(), PAD, PAD, PAD],
    ]
    assert packed.inputs["labels"][1].tolist() == [*third.labels.tolist(), IGNORED, IGNORED, IGNORED]
    assert set(packed.inputs) == {"input_ids", "labels", "position_ids", "use_cache"}
    assert (packed.tokens, packed.examples) == (9, 3)
    padded = collate([(first,), (second,)], pad=PAD, packed=False)
    assert padded.inputs["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert set(padded.inputs) == {"input_ids", "labels", "attention_mask", "use_cache"}
    assert (padded.tokens, padded.examples) == (6, 2)
    assert all(t.dtype == torch.int64 for t in [*packed.inputs.values(), *padded.inputs.values()] if torch.is_tensor(t))


@given(st.lists(st.integers(1, 32), max_size=60), st.integers(0, 2**31 - 1))
def test_packing_keeps_every_example_whole_and_once(lengths: list[int], seed: int) -> None:
    examples = [example(length, seed=index) for index, length in enumerate(lengths)]
    rows = pack(examples, 32, seed)
    assert sorted(id(one) for row in rows for one in row) == sorted(id(one) for one in examples)
    sizes = sorted(sum(len(one) for one in row) for row in rows)
    assert all(size <= 32 for size in sizes)
    # No two rows would fit into one: hence at most twice as many rows as there could be.
    assert len(sizes) < 2 or sizes[0] + sizes[1] > 32
    again = pack(examples, 32, seed)
    assert [[id(one) for one in row] for row in rows] == [[id(one) for one in row] for row in again]


def test_the_seed_mixes_examples_of_like_length() -> None:
    examples = [example(8, seed=index) for index in range(16)]
    assert [[id(o) for o in row] for row in pack(examples, 32, 0)] != [
        [id(o) for o in row] for row in pack(examples, 32, 1)
    ]


def test_packing_wastes_little() -> None:
    lengths = np.random.default_rng(0).integers(20, 200, 400)
    rows = pack([example(int(length)) for length in lengths], 512, 0)
    assert sum(lengths) / (len(rows) * 512) > 0.97


def test_rows_of_one_example_keep_their_order() -> None:
    assert arrange(EXAMPLES, packed=False, max_length=20, seed=0) == [(one,) for one in EXAMPLES]
    assert len(arrange(EXAMPLES, packed=True, max_length=20, seed=1)) == 2


def test_virtual_tokens_and_packing_do_not_go_together() -> None:
    # That the other kinds do is tried on a model: test_trainer_adapters_train.
    assert [kind for kind in get_args(AdapterKind) if not adapter_allows_packing(kind)] == list(PROMPT_KINDS)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_keeps_examples_apart_is_known(attention: str, dtype: torch.dtype) -> None:
    model = llama(attention, dtype).eval()
    assert keeps_examples_apart(model, VOCABULARY)
    assert not keeps_examples_apart(lambda **inputs: model(**{**inputs, "position_ids": None}), VOCABULARY)


def test_a_model_that_sees_examples_apart_but_misplaces_them_is_known() -> None:
    model = llama("eager").eval()

    def misplacing(input_ids: torch.Tensor, position_ids: torch.Tensor, *, use_cache: bool) -> object:
        # Block-diagonal attention, but positions that go on: no leak of content, and yet not the example alone.
        later = position_ids + 40 * (torch.arange(position_ids.shape[1]) >= 8)
        scaled = later * torch.where(torch.arange(position_ids.shape[1]) >= 8, 3, 1)
        return model(input_ids=input_ids, position_ids=scaled, use_cache=use_cache)

    assert not keeps_examples_apart(misplacing, VOCABULARY)


def test_a_model_that_leaks_a_little_over_one_border_is_known() -> None:
    model = llama("eager").eval()
    extra = 0.25 * torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(0))

    def leaking(input_ids: torch.Tensor, position_ids: torch.Tensor, *, use_cache: bool) -> object:
        # As a convolution over two tokens would: only the token after the border sees across it.
        output = model(input_ids=input_ids, position_ids=position_ids, use_cache=use_cache)
        if input_ids.shape[1] > 8:
            output.logits[:, 8] += output.logits.std() * extra[input_ids[:, 7]]
        return output

    assert not keeps_examples_apart(leaking, VOCABULARY)


class Stream(torch.nn.Module):
    """A recurrent language model: it takes positions and heeds them not."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = torch.nn.Embedding(VOCABULARY, 16)
        self.cell = torch.nn.GRU(16, 16, batch_first=True)
        self.head = torch.nn.Linear(16, VOCABULARY)

    def forward(self, input_ids: torch.Tensor, **ignored: object) -> object:
        class Output:
            logits = self.head(self.cell(self.embed(input_ids))[0])

        return Output


def test_a_model_that_reads_a_stream_is_known() -> None:
    assert not keeps_examples_apart(Stream().eval(), VOCABULARY)
