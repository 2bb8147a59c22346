"""Sequences become the steps of a round, the same for every rank but for its share.

Each rank computes the whole deterministic order and takes its part, so a step's number of answer tokens over all ranks
and micro batches is known without communication. The loss of a step is the mean over those tokens: a rank adds up its
micro batches' summed losses and divides by ``Step.answer_tokens``. Averaging the micro batches' means instead would
weigh a token by how few others share its batch.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

import numpy as np
import torch

from fsllm_client.data.tokenise import IGNORED, Encoded
from fsllm_common.plan.schema import Train

Row = tuple[Encoded, ...]
"""What stands in one row of a batch: one example, or several packed ones."""


@dataclass(frozen=True, slots=True)
class Batch:
    """What one forward pass takes, on the CPU.

    ``inputs`` are keyword arguments of a causal language model: input_ids and labels, int64 of shape (sequences,
    tokens); packed batches add position_ids (int64, same shape), padded ones attention_mask (int64, same shape, 1 =
    token). ``use_cache=False`` is among them: with a key-value cache transformers would not look for packed examples.
    """

    inputs: dict[str, Any]
    answer_tokens: int
    """How many losses its own is the sum of: one an answer token, or one a preference."""
    tokens: int
    examples: int
    pairs: tuple[Encoded, ...] = ()
    """Of preferences: each has two rows in ``inputs``, the chosen answer's and then the rejected one's."""


@dataclass(frozen=True, slots=True)
class Step:
    """One optimizer step: this rank's micro batches, equally many on every rank, and counts over all ranks."""

    micro_batches: tuple[Batch, ...]
    answer_tokens: int
    tokens: int
    examples: int


def collate(rows: Sequence[Row], *, pad: int, packed: bool) -> Batch:
    """Make one batch, filled at the right to its longest row. Rows that are not ``packed`` hold exactly one example."""
    pairs = tuple(example for row in rows for example in row if example.rejected is not None)
    losses = sum(example.answer_tokens for row in rows for example in row)
    examples = sum(len(row) for row in rows)
    if not packed:
        rows = [(side,) for row in rows for example in row for side in example.sides]
    width = max(sum(len(example) for example in row) for row in rows)
    input_ids = np.full((len(rows), width), pad, np.int64)
    labels = np.full((len(rows), width), IGNORED, np.int64)
    # In packed rows padding is one more example, without loss: its positions restart too.
    positions = np.zeros((len(rows), width), np.int64)
    mask = np.zeros((len(rows), width), np.int64)
    for index, row in enumerate(rows):
        at = 0
        for example in row:
            end = at + len(example)
            input_ids[index, at:end] = example.input_ids
            labels[index, at:end] = example.labels
            positions[index, at:end] = np.arange(len(example))
            at = end
        positions[index, at:] = np.arange(width - at)
        mask[index, :at] = 1
    inputs: dict[str, Any] = {"input_ids": torch.from_numpy(input_ids), "labels": torch.from_numpy(labels)}
    if packed:
        inputs["position_ids"] = torch.from_numpy(positions)
    else:
        inputs["attention_mask"] = torch.from_numpy(mask)
    inputs["use_cache"] = False
    return Batch(
        inputs,
        answer_tokens=losses,
        tokens=int(mask.sum()),
        examples=examples,
        pairs=pairs,
    )


def evaluation_batches(examples: Sequence[Encoded], *, batch_size: int, pad: int) -> Iterator[Batch]:
    """Yield every example once, in padded batches of like lengths, the longest first: memory fails at once or never."""
    ordered = sorted(examples, key=len, reverse=True)
    for start in range(0, len(ordered), batch_size):
        yield collate([(example,) for example in ordered[start : start + batch_size]], pad=pad, packed=False)


def steps_in_round(train: Train, sequences: int) -> int:
    """Return the number of optimizer steps of one round: the plan's, or so many as its epochs take at this site."""
    if train.steps is not None:
        return train.steps
    return max(1, ceil((train.epochs or 1.0) * sequences / min(train.batch_size, sequences)))


class TrainingBatches:
    """An endless iterator over the steps of one round.

    It passes over all sequences again and again, each pass in a new order given by seed, round and pass. A step never
    holds a sequence twice: a site with fewer sequences than ``batch_size`` takes all of them as one step. Within a
    step, sequences of like length share a micro batch, which saves padding; across steps nothing is grouped, for a
    step of like lengths is often a step of one kind of task: every step is a sample of the whole.

    Args:
        sequences: At least one, in the same order on every rank.
        packed: Whether they hold several examples each.
        batch_size: Sequences a step over all ranks and micro batches.
        micro_batch_size: Sequences a forward pass of one rank; ``None``: the rank's whole share.
        pad: The id to pad with.
        seed: The plan's.
        round_number: The round's.
        rank: This process, of ``world``.
        world: The number of processes.

    """

    def __init__(
        self,
        sequences: Sequence[Row],
        *,
        packed: bool,
        batch_size: int,
        micro_batch_size: int | None = None,
        pad: int,
        seed: int,
        round_number: int,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self._sequences = sequences
        self._lengths = np.array([sum(len(example) for example in row) for row in sequences])
        self._counts = np.array([len(row) for row in sequences])
        self._packed = packed
        self._batch_size = min(batch_size, len(sequences))
        share = ceil(self._batch_size / world)
        self._micro_batch_size = min(micro_batch_size or share, share)
        self._pad = pad
        self._seeds = (seed, round_number)
        self._rank = rank
        self._world = world
        self.micro_batches_a_step = ceil(share / self._micro_batch_size)

    def __iter__(self) -> Iterator[Step]:
        """Yield steps for ever, the same ones each time."""
        pending: list[int] = []
        passes = 0
        while True:
            while len(pending) < self._batch_size:
                random = np.random.default_rng([*self._seeds, passes])
                fresh = self._shuffle(random)
                passes += 1
                # A step that spans two passes takes what it does not have yet; the rest keeps its order.
                held = set(pending)
                pending += [index for index in fresh if index not in held] + [index for index in fresh if index in held]
            taken, pending = pending[: self._batch_size], pending[self._batch_size :]
            yield self._step(taken)

    def _shuffle(self, random: np.random.Generator) -> list[int]:
        """Return a pass's order; packed sequences of few examples and of many are spread over it evenly.

        Packing leaves the short examples for its last sequences. Were those dealt out by chance, steps would differ
        more than steps of so many single examples do, and Adam, which divides by the gradients' spread, would learn
        less from each example. So the sequences are sorted by their number of examples into as many strata as a step
        has sequences, and each stratum is spread evenly over the pass, in an order of its own.
        """
        shuffled = random.permutation(len(self._sequences))
        if not self._packed:
            return [int(index) for index in shuffled]
        by_examples = shuffled[np.argsort(self._counts[shuffled], kind="stable")]
        when = np.empty(len(by_examples))
        for stratum in np.array_split(np.arange(len(by_examples)), self._batch_size):
            size = len(stratum)
            when[stratum] = (random.permutation(size) + random.random(size)) / size
        return [int(index) for index in by_examples[np.argsort(when)]]

    def _step(self, taken: list[int]) -> Step:
        # Dealt out by length, so that the ranks' shares cost alike; a rank waits for the slowest.
        dealt = sorted(taken, key=lambda index: -int(self._lengths[index]))
        share = [self._sequences[index] for index in dealt[self._rank :: self._world]]
        size = self._micro_batch_size
        micro_batches = [
            collate(share[start : start + size], pad=self._pad, packed=self._packed)
            for start in range(0, len(share), size)
        ]
        # A rank that is dealt fewer still takes part in every backward pass, which is a collective operation.
        idle = collate([self._sequences[dealt[-1]]], pad=self._pad, packed=self._packed)
        while len(micro_batches) < self.micro_batches_a_step:
            micro_batches.append(_without_loss(idle))
        rows = [self._sequences[index] for index in taken]
        return Step(
            tuple(micro_batches),
            answer_tokens=sum(example.answer_tokens for row in rows for example in row),
            tokens=int(self._lengths[taken].sum()),
            examples=sum(len(row) for row in rows),
        )


def _without_loss(batch: Batch) -> Batch:
    inputs = {**batch.inputs, "labels": torch.full_like(batch.inputs["labels"], IGNORED)}
    return Batch(inputs, answer_tokens=0, tokens=0, examples=0)
