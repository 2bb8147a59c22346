"""Which of a site's rows are validation: decided by each row's content and the plan's seed, and by nothing else.

So a row keeps its side when others are added, removed or reordered, and equal rows are always on the same side: what
was once validation is never trained on in this run, even when the site's files grow between two starts of the trainer.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from fsllm_client.data.rows import Example

_KEYS: Final = 2**64


@dataclass(frozen=True, slots=True)
class Split:
    """The two sides. ``held_out`` counts validation rows past the limit: neither trained on nor measured.

    Giving those back to training would let a row change sides when others arrive.
    """

    train: list[Example]
    validation: list[Example]
    held_out: int


def content_key(example: Example, seed: int) -> int:
    """Return a number in [0, 2**64) that depends on the example's content and the seed, as good as drawn at random."""
    rejected = [] if example.rejected is None else [example.rejected]
    content = json.dumps([example.format, [[turn.role, turn.content, turn.input] for turn in example.turns], *rejected])
    digest = hashlib.blake2b(content.encode(), digest_size=8, key=seed.to_bytes(8, "big"))
    return int.from_bytes(digest.digest(), "big")


def split(examples: Iterable[Example], *, seed: int, fraction: float, limit: int) -> Split:
    """Split off about ``fraction`` of the rows as validation, and keep at most ``limit`` of them.

    Validation is in the order of its keys, so that any first part of it is a fair sample.
    """
    keyed = [(content_key(example, seed), example) for example in examples]
    bound = int(fraction * _KEYS)
    train = [example for key, example in keyed if key >= bound]
    validation = in_key_order([example for key, example in keyed if key < bound], seed)
    return Split(train, validation[:limit], max(0, len(validation) - limit))


def in_key_order(examples: Iterable[Example], seed: int) -> list[Example]:
    """Return the examples in an order that is random but stable, so that a first part is a fair sample."""
    return sorted(examples, key=lambda example: content_key(example, seed))
