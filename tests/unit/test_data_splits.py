"""A row's side depends on its content and the seed, and on nothing else."""

import random
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from fsllm_client.data.rows import Example, Place, Turn
from fsllm_client.data.splits import content_key, in_key_order, split

PLACE = Place(Path("a"), 1)


def row(prompt: str, answer: str = "x", place: Place = PLACE) -> Example:
    return Example("completion", (Turn("user", prompt), Turn("assistant", answer)), place)


rows = st.lists(st.builds(row, st.text(max_size=2), st.text(max_size=1)), max_size=40)


@given(rows, rows, st.integers(0, 2**31 - 1), st.floats(0, 0.99), st.integers(1, 5), st.randoms())
def test_new_rows_move_no_old_row(
    old: list[Example], new: list[Example], seed: int, fraction: float, limit: int, order: random.Random
) -> None:
    before = split(old, seed=seed, fraction=fraction, limit=limit)
    grown = [*old, *new]
    order.shuffle(grown)
    after = split(grown, seed=seed, fraction=fraction, limit=limit)
    assert all(example in after.train for example in before.train)
    assert not any(example in after.train for example in before.validation)
    assert not any(example in after.train for example in after.validation)
    assert len(after.train) + len(after.validation) + after.held_out == len(grown)
    assert len(after.validation) <= limit


def test_the_fraction_is_kept_and_the_rest_past_the_limit_is_not_trained_on() -> None:
    examples = [row(str(number)) for number in range(4000)]
    sides = split(examples, seed=3, fraction=0.1, limit=10**6)
    assert 330 < len(sides.validation) < 470  # 400, five standard deviations of 19 either way would be 305 to 495
    limited = split(examples, seed=3, fraction=0.1, limit=50)
    assert limited.train == sides.train
    assert limited.validation == sides.validation[:50]
    assert limited.held_out == len(sides.validation) - 50
    assert split(examples, seed=3, fraction=0, limit=50).validation == []


def test_the_seed_and_every_part_of_the_content_count_and_the_place_does_not() -> None:
    base = row("p", "a")
    others = [
        row("a", "p"),
        row("pa", ""),
        Example("instruction", base.turns, PLACE),
        Example("completion", (Turn("user", "", "p"), Turn("assistant", "a")), PLACE),
        Example("completion", (Turn("system", "p"), Turn("assistant", "a")), PLACE),
    ]
    keys = {content_key(example, 0) for example in [base, *others]} | {content_key(base, 1)}
    assert len(keys) == len(others) + 2
    assert content_key(row("p", "a", Place(Path("b"), 9)), 0) == content_key(base, 0)


def test_the_key_stays_the_same_from_release_to_release() -> None:
    # Else an upgrade in the middle of a run would move rows into training. This is
    # blake2b('["completion", [["user", "gr\\u00fcn", ""], ["assistant", "4", ""]]]', key=seed, 8 bytes).
    assert content_key(row("grün", "4"), 7) == 7445936198790438495


def test_order_of_keys_is_stable() -> None:
    examples = [row(str(number)) for number in range(50)]
    ordered = in_key_order(examples, 5)
    assert ordered == in_key_order(examples[::-1], 5)
    assert ordered != examples
    assert sorted(ordered, key=repr) == sorted(examples, key=repr)
    assert in_key_order(examples[:25], 5) == [example for example in ordered if example in examples[:25]]
