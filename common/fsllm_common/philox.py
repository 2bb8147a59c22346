"""Philox4x32-10 (Salmon et al. 2011, SC11), a counter-based generator: the same bits on every machine and device.

A number is a pure function of its key and its counter, so that any stretch can be made without what is before it, and
nothing is stored. The generator is integer arithmetic on whole arrays; what is made of its words here is exact, too:
signs, and numbers evenly spread that float32 holds as they are. No logarithm or cosine, whose last bits are each
library's own, and no distribution of numpy's or torch's, which their next version may draw in another way.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any, Final, TypeVar

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

_MULTIPLIERS: Final = (0xD2511F53, 0xCD9E8D57)
_WEYL: Final = (0x9E3779B9, 0xBB67AE85)
_MASK: Final = 0xFFFFFFFF
_ROUNDS: Final = 10

BITS: Final = 128
"""Of what one counter gives: four words."""

_SIGNIFICAND: Final = 24  # bits of a float32's

Words = TypeVar("Words", bound=Any)
"""Arrays of int64 that hold words of 32 bits: numpy's, or torch's on any device."""


def philox4x32(counter: tuple[Words, Words, Words, Words], key: tuple[Words, Words]) -> tuple[Words, ...]:
    """Return the four words of each counter, the lowest first; shapes are broadcast.

    Args:
        counter: Its words, the lowest first; arrays, of which the first is of one or more dimensions.
        key: Likewise.

    """
    a, b, c, d = counter
    low, high = key
    for _ in range(_ROUNDS):
        # A product of two words overflows int64's sign, and the mask takes off what the shift then carries in.
        first, second = a * _MULTIPLIERS[0], c * _MULTIPLIERS[1]
        a, b, c, d = (
            (second >> 32 & _MASK) ^ b ^ low,
            second & _MASK,
            (first >> 32 & _MASK) ^ d ^ high,
            first & _MASK,
        )
        low, high = low + _WEYL[0] & _MASK, high + _WEYL[1] & _MASK
    return a, b, c, d


def stream(name: str) -> int:
    """Return a number below 2**64 that stands for a name: independent numbers for the same key."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


def bits(keys: npt.NDArray[np.int64], stream_: int, start: int, stop: int) -> npt.NDArray[np.uint8]:
    """Return fair bits, (keys, stop - start), each 0 or 1: elements ``start`` to ``stop`` of each key's own stretch.

    Args:
        keys: Numbers of 64 bits.
        stream_: Below 2**64.
        start: A multiple of ``BITS``.
        stop: Past the last element.

    """
    import numpy as np

    words = np.stack(_words(keys, stream_, start // BITS, -(-stop // BITS)), axis=-1)  # (keys, counters, 4)
    drawn = np.unpackbits(words.astype("<u4").view(np.uint8).reshape(len(keys), -1), axis=1, bitorder="little")
    return drawn[:, : stop - start]


def signs(shape: tuple[int, ...], key: int, stream_: int) -> npt.NDArray[np.float32]:
    """Return fair signs, -1 or 1: of mean 0 and variance 1.

    Args:
        shape: Of the array.
        key: Of 64 bits.
        stream_: Below 2**64; see ``stream``.

    """
    import numpy as np

    size = int(np.prod(shape))
    drawn: npt.NDArray[np.float32] = bits(np.array([key]), stream_, 0, size).astype(np.float32)
    return (2 * drawn - 1).reshape(shape)


def uniform(shape: tuple[int, ...], bound: float, seed: int, stream_: int = 0) -> npt.NDArray[np.float32]:
    """Return numbers drawn evenly from (-bound, bound).

    Args:
        shape: Of the array.
        bound: Rounded to float32.
        seed: The key, below 2**63.
        stream_: Below 2**64.

    """
    import numpy as np

    size = int(np.prod(shape))
    words = np.stack(_words(np.array([seed]), stream_, 0, -(-size // 4)), axis=-1).reshape(-1)[:size]
    # Odd integers in (-2**24, 2**24), which float32 holds exactly, as it does their product with a power of two.
    odd = 2 * (words >> 32 - _SIGNIFICAND) + 1 - 2**_SIGNIFICAND
    drawn: npt.NDArray[np.float32] = odd.astype(np.float32) * np.float32(2.0**-_SIGNIFICAND) * np.float32(bound)
    return drawn.reshape(shape)


def _words(keys: npt.NDArray[np.int64], stream_: int, start: int, stop: int) -> tuple[npt.NDArray[np.int64], ...]:
    """Return the words of counters ``start`` to ``stop``, (keys, counters) each."""
    import numpy as np

    index, column = np.arange(start, stop, dtype=np.int64)[None, :], keys.astype(np.int64)[:, None]
    lower, upper = (np.array([stream_ >> shift & _MASK], dtype=np.int64) for shift in (0, 32))
    return philox4x32((index & _MASK, index >> 32, lower, upper), (column & _MASK, column >> 32 & _MASK))
