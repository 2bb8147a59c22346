"""The steps of a round: reproducible, complete, shared out over ranks, and weighed by answer tokens."""

from collections import Counter
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fsllm_client.data.batches import Row, Step, TrainingBatches, evaluation_batches, steps_in_round
from fsllm_client.data.tokenise import IGNORED, Encoded
from fsllm_common.plan.schema import Train


def example(number: int, length: int, answer: int = 1) -> Encoded:
    """Make an example whose every token is its number."""
    ids = np.full(length, number, np.int32)
    labels = ids.copy()
    labels[: length - answer] = IGNORED
    return Encoded(ids, labels, 0, None)


ROWS: list[Row] = [(example(n + 1, 2 + n % 7, 1 + n % 2),) for n in range(23)]


def steps(count: int, rows: list[Row] = ROWS, **options: int) -> list[Step]:
    settings: dict[str, Any] = {"packed": False, "batch_size": 5, "pad": 0, "seed": 1, "round_number": 2, **options}
    return list(islice(TrainingBatches(rows, **settings), count))


def numbers(step: Step) -> list[int]:
    """Return the examples that this rank trains on in a step, batch by batch."""
    trained = [b.inputs["input_ids"][(b.inputs["labels"] != IGNORED).any(1), 0] for b in step.micro_batches]
    return [int(number) for batch in trained for number in batch]


def test_the_same_seed_and_round_give_the_same_steps_and_others_do_not() -> None:
    base = [numbers(step) for step in steps(12)]
    assert base == [numbers(step) for step in steps(12)]
    assert base != [numbers(step) for step in steps(12, seed=2)]
    assert base != [numbers(step) for step in steps(12, round_number=3)]
    again = TrainingBatches(ROWS, packed=False, batch_size=5, pad=0, seed=1, round_number=2)
    assert [numbers(s) for s in islice(again, 3)] == [numbers(s) for s in islice(again, 3)] == base[:3]


@given(st.integers(1, 23), st.integers(1, 30), st.integers(1, 4), st.integers(1, 6))
def test_every_pass_takes_everything_once_and_a_step_nothing_twice(
    count: int, batch_size: int, world: int, micro: int
) -> None:
    rows = ROWS[:count]
    size = min(batch_size, count)
    options = {"batch_size": batch_size, "micro_batch_size": micro, "world": world}
    ranks = [steps(count, rows, rank=rank, **options) for rank in range(world)]
    taken = [[n for rank in at_once for n in numbers(rank)] for at_once in zip(*ranks, strict=True)]
    assert all(len(step) == len(set(step)) == size for step in taken)
    # `count` steps of `size` are exactly `size` passes.
    assert Counter(n for step in taken for n in step) == dict.fromkeys(range(1, count + 1), size)
    for at_once in zip(*ranks, strict=True):
        assert len({len(rank.micro_batches) for rank in at_once}) == 1
        assert all(batch.inputs["input_ids"].shape[0] <= micro for rank in at_once for batch in rank.micro_batches)
        for counted in ("answer_tokens", "tokens", "examples"):
            parts = sum(getattr(batch, counted) for rank in at_once for batch in rank.micro_batches)
            assert {getattr(rank, counted) for rank in at_once} == {parts}
        labels = sum(int((b.inputs["labels"] != IGNORED).sum()) for rank in at_once for b in rank.micro_batches)
        assert labels == at_once[0].answer_tokens


def test_passes_do_not_overlap() -> None:
    flat = [n for step in steps(9) for n in numbers(step)]  # 45 of 23 + 22; the step in the middle spans both passes
    assert sorted(flat[:20] + [n for n in flat[20:25] if n not in flat[:20]]) == list(range(1, 24))


def test_every_step_has_sequences_of_few_and_of_many_examples_in_the_proportion_of_the_whole() -> None:
    few: list[Row] = [(example(n, 5),) for n in range(1, 13)]
    many: list[Row] = [tuple(example(n, 1) for _ in range(5)) for n in range(13, 25)]
    for number in range(20):
        found = steps(12, [*few, *many], packed=True, batch_size=4, round_number=number)
        assert {step.examples for step in found} == {2 * 1 + 2 * 5}


@pytest.mark.parametrize("counts", [[1] * 8, [1, 1, 1, 2, 2, 4, 4, 9]])
def test_every_sequence_is_as_likely_in_any_step(counts: list[int]) -> None:
    rows: list[Row] = [tuple(example(n, 1) for _ in range(count)) for n, count in enumerate(counts)]
    passes = 3000
    firsts = [
        {
            int(row[0])
            for row in steps(1, rows, batch_size=2, packed=True, round_number=number)[0]
            .micro_batches[0]
            .inputs["input_ids"]
        }
        for number in range(passes)
    ]
    # Two of eight a step; five standard deviations of the binomial.
    in_first = Counter(n for step in firsts for n in step)
    assert all(abs(in_first[n] - passes / 4) < 5 * (passes * 3 / 16) ** 0.5 for n in range(8))
    if len(set(counts)) == 1:  # then there is nothing to balance, and any two may meet
        pairs = Counter(frozenset(step) for step in firsts)
        assert len(pairs) == 28
        assert all(abs(times - passes / 28) < 5 * (passes * 27 / 28**2) ** 0.5 for times in pairs.values())


def test_a_rank_without_a_share_takes_part_without_loss() -> None:
    two = [steps(1, ROWS[:1], rank=rank, world=2)[0] for rank in range(2)]
    assert [len(step.micro_batches) for step in two] == [1, 1]
    idle = two[1].micro_batches[0]
    assert (idle.answer_tokens, idle.tokens, idle.examples) == (0, 0, 0)
    assert bool((idle.inputs["labels"] == IGNORED).all())
    assert idle.inputs["input_ids"].numel() > 0
    assert two[1].answer_tokens == two[0].answer_tokens == 1


def test_like_lengths_share_a_micro_batch() -> None:
    for step in steps(6, batch_size=8, micro_batch_size=2):
        lengths = [batch.inputs["attention_mask"].sum(1).tolist() for batch in step.micro_batches]
        flat = [length for batch in lengths for length in batch]
        assert flat == sorted(flat, reverse=True)


def test_the_number_of_micro_batches_is_known_beforehand() -> None:
    batches = TrainingBatches(
        ROWS, packed=False, batch_size=16, micro_batch_size=3, pad=0, seed=0, round_number=0, rank=1, world=3
    )
    assert batches.micro_batches_a_step == 2  # a share of 6 at most
    assert len(next(iter(batches)).micro_batches) == 2


def test_packed_rows_are_collated_as_packed() -> None:
    rows: list[Row] = [(example(1, 3), example(2, 2)), (example(3, 4),)]
    (step,) = steps(1, rows, packed=True, batch_size=2)
    (batch,) = step.micro_batches
    assert batch.inputs["position_ids"].tolist() == [[0, 1, 2, 0, 1], [0, 1, 2, 3, 0]]
    assert (step.examples, step.tokens) == (3, 9)


def test_a_steps_loss_is_the_mean_over_its_answer_tokens_however_it_is_cut() -> None:
    torch.manual_seed(0)
    table = torch.randn(64, 64)  # a bigram model: its loss depends on each token alone

    def total(step: Step) -> float:
        losses = [
            torch.nn.functional.cross_entropy(
                table[batch.inputs["input_ids"][:, :-1]].flatten(0, 1),
                batch.inputs["labels"][:, 1:].flatten(),
                ignore_index=IGNORED,
                reduction="sum",
            )
            for batch in step.micro_batches
        ]
        return float(sum(losses)) / step.answer_tokens

    (whole,) = steps(1, batch_size=7)
    ranks = [steps(1, batch_size=7, micro_batch_size=2, rank=rank, world=3)[0] for rank in range(3)]
    assert sum(total(rank) for rank in ranks) == pytest.approx(total(whole), rel=1e-6)


@pytest.mark.parametrize(
    ("steps_", "epochs", "sequences", "expected"),
    [
        (7, None, 100, 7),
        (None, 1.0, 32, 2),
        (None, 1.0, 33, 3),
        (None, 0.5, 64, 2),
        (None, 3.0, 4, 3),
        (None, 0.001, 4, 1),
    ],
)
def test_steps_of_a_round(steps_: int | None, epochs: float | None, sequences: int, expected: int) -> None:
    assert steps_in_round(Train(steps=steps_, epochs=epochs, batch_size=16), sequences) == expected


def test_evaluation_takes_each_example_once_the_longest_first() -> None:
    examples = [row[0] for row in ROWS]
    batches = list(evaluation_batches(examples, batch_size=4, pad=0))
    assert [batch.examples for batch in batches] == [4, 4, 4, 4, 4, 3]
    widths = [batch.inputs["input_ids"].shape[1] for batch in batches]
    assert widths == sorted(widths, reverse=True)
    assert sorted(int(n) for batch in batches for n in batch.inputs["input_ids"][:, 0]) == list(range(1, 24))
    assert sum(batch.answer_tokens for batch in batches) == sum(one.answer_tokens for one in examples)
