"""The generator against the known answers of its authors, and what is made of its words."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fsllm_common import philox

# Random123, tests/kat_vectors, "philox4x32 10": counter, key, words.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize("library", [np, torch])
@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_the_known_answers_come_out_in_both_libraries(library: object, counter: str, key: str, expected: str) -> None:
    make = np.array if library is np else torch.tensor
    made = [[make([word]) for word in words(text)] for text in (counter, key)]
    found = philox.philox4x32(tuple(made[0]), tuple(made[1]))
    assert [int(word[0]) for word in found] == words(expected)


def scalar(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10 once more, for one counter, in Python's own integers, as the paper's figure has it."""
    left, right = counter[:2], counter[2:]
    k = list(key)
    for _ in range(10):
        p, q = 0xD2511F53 * left[0], 0xCD9E8D57 * right[0]
        left, right = (
            [(q >> 32) ^ left[1] ^ k[0], q & 0xFFFFFFFF],
            [(p >> 32) ^ right[1] ^ k[1], p & 0xFFFFFFFF],
        )
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return left + right


@given(
    st.integers(-(2**63), 2**63 - 1),
    st.integers(0, 2**64 - 1),
    st.integers(0, 40),
    st.integers(1, 700),
)
def test_a_bit_is_a_function_of_its_key_stream_and_place(key: int, stream: int, block: int, count: int) -> None:
    start = block * philox.BITS
    found = philox.bits(np.array([key, 5]), stream, start, start + count)
    assert found.shape == (2, count)
    for at in {0, count // 2, count - 1}:
        place = start + at
        counter = [place // 128, 0, stream & 0xFFFFFFFF, stream >> 32]
        word = scalar(counter, [key & 0xFFFFFFFF, key >> 32 & 0xFFFFFFFF])[place % 128 // 32]
        assert found[0, at] == word >> place % 32 & 1


def test_signs_are_the_bits_of_a_known_answer() -> None:
    drawn = philox.signs((4, 32), 0, 0)
    assert drawn.dtype == np.float32
    for row, word in zip(drawn, words(KNOWN[0][2]), strict=True):
        assert [value > 0 for value in row] == [bool(word >> bit & 1) for bit in range(32)]
    assert set(drawn.ravel().tolist()) == {-1.0, 1.0}


def test_signs_are_fair_and_other_keys_and_names_give_others() -> None:
    base = philox.signs((200_000,), 7, philox.stream("a"))
    assert abs(base.mean()) < 4 / 200_000**0.5
    for other in (philox.signs((200_000,), 8, philox.stream("a")), philox.signs((200_000,), 7, philox.stream("b"))):
        assert abs((base * other).mean()) < 4 / 200_000**0.5
    assert abs((base[1:] * base[:-1]).mean()) < 4 / 200_000**0.5
    assert philox.signs((), 7, 0).shape == ()


def test_even_numbers_are_the_words_highest_bits() -> None:
    expected = [np.float32((2 * (word >> 8) + 1 - 2**24) / 2**24) * np.float32(0.3) for word in words(KNOWN[0][2])]
    drawn = philox.uniform((2, 2), 0.3, 0)
    assert drawn.dtype == np.float32
    assert drawn.ravel().tolist() == [float(x) for x in expected]
    many = philox.uniform((100_001,), 1.0, 7)
    assert abs(float(many.mean())) < 0.01
    assert float(many.var()) == pytest.approx(1 / 3, rel=0.02)
    assert float(np.abs(many).max()) < 1
    assert not np.array_equal(philox.uniform((4,), 1.0, 7, 1), philox.uniform((4,), 1.0, 7, 0))
