"""Several examples in one sequence, kept apart by attention, so that no step is spent on padding.

Positions restart at 0 with each example. transformers (4.53 and newer) reads the boundaries off the positions and
builds a block-diagonal causal mask for whichever attention it runs (eager, SDPA, Flash), provided that the call has
neither an attention mask nor a key-value cache: ``batches`` sees to both. We build no mask of our own: a
four-dimensional one is quadratic in memory, is added rather than applied when it is boolean and attention is eager (a
silent leak), is refused by Flash attention, and overrides the sliding windows of the models that have them.

Whether a given model obeys is not assumed: ``keeps_examples_apart`` tries it. A model that reads its input as a stream
(a state-space or recurrent layer) or places words by other means than positions does not, and is fed padded batches
instead.
"""

from bisect import bisect_left, insort
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fsllm_client.data.tokenise import Encoded
from fsllm_common.plan.combinations import PROMPT_KINDS

if TYPE_CHECKING:
    import torch


def adapter_allows_packing(kind: str) -> bool:
    """Whether sequences may hold several examples: of virtual tokens before a sequence, only the first would see."""
    return kind not in PROMPT_KINDS


def pack(examples: Sequence[Encoded], max_length: int, seed: int) -> list[tuple[Encoded, ...]]:
    """Put the examples into as few sequences of at most ``max_length`` tokens as best-fit decreasing finds.

    Every example goes whole into exactly one sequence. Among examples of one length the seed decides, and nothing
    depends on anything else. O(n log n) comparisons.
    """
    shuffled = np.random.default_rng(seed).permutation(len(examples))
    longest_first = sorted(shuffled, key=lambda index: -len(examples[index]))
    sequences: list[list[Encoded]] = []
    room: list[tuple[int, int]] = []  # (free tokens, sequence), in order, of the sequences that are not full
    for index in longest_first:
        example = examples[index]
        best = bisect_left(room, (len(example), -1))
        if best == len(room):
            free, where = max_length, len(sequences)
            sequences.append([])
        else:
            free, where = room.pop(best)
        sequences[where].append(example)
        if free > len(example):
            insort(room, (free - len(example), where))
    return [tuple(sequence) for sequence in sequences]


def arrange(examples: Sequence[Encoded], *, packed: bool, max_length: int, seed: int) -> list[tuple[Encoded, ...]]:
    """Return the rows of training batches: several examples each where ``packed``, else one."""
    return pack(examples, max_length, seed) if packed else [(example,) for example in examples]


def keeps_examples_apart(model: Callable[..., Any], vocabulary: int, device: "torch.device | str" = "cpu") -> bool:
    """Whether packed examples are invisible to each other in this model, found out by three small forward passes.

    A packed second example must give the same logits whatever the first one is, and the logits that it gives alone.

    Args:
        model: Called with input_ids, position_ids and use_cache; its result has ``logits``. Must be in eval mode, and
            under ZeRO-3 every rank must make this call.
        vocabulary: The number of token ids, at least 8.
        device: Where the model takes its input.

    """
    import torch

    generator = torch.Generator().manual_seed(0)
    first, other, second = torch.randint(vocabulary, (3, 8), generator=generator)
    positions = torch.arange(8)

    def logits(*examples: "torch.Tensor") -> "torch.Tensor":
        output = model(
            input_ids=torch.cat(examples)[None].to(device),
            position_ids=positions.repeat(len(examples))[None].to(device),
            use_cache=False,
        )
        result: torch.Tensor = output.logits[0, -8:].float()
        return result

    with torch.no_grad():
        packed, beside_other, alone = logits(first, second), logits(other, second), logits(second)
    # A leak moves logits by a good part of their spread; rounding, even of bfloat16, by far less.
    allowed = 0.05 * alone.std()
    return bool((packed - beside_other).abs().max() <= allowed) and bool((packed - alone).abs().mean() <= allowed)
