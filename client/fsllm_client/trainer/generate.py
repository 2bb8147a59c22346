"""Greedy answers, batched, with a key-value cache.

Written out rather than left to ``generate``: that takes sampling settings from the model's folder, and with virtual
tokens its padding moves the text away from them. Here prompts are padded at the left with positions to match, and with
virtual tokens a batch holds prompts of one length, which need no padding.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from peft import PeftModel


def batches_of(lengths: Sequence[int], size: int, *, equal: bool) -> list[list[int]]:
    """Return the indices of ``lengths`` in batches of at most ``size``, longest first.

    Args:
        lengths: Of the prompts, in tokens.
        size: At most so many prompts a batch.
        equal: Whether a batch may hold one length only.

    """
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        last = batches[-1] if batches else None
        if last is None or len(last) == size or (equal and lengths[last[0]] != lengths[index]):
            batches.append([index])
        else:
            last.append(index)
    return batches


def greedy(
    model: PeftModel,
    prompts: Sequence[Sequence[int]],
    *,
    most: int,
    ends: Collection[int],
    pad: int,
    device: torch.device,
    all_done: Callable[[bool], bool] = bool,
) -> list[list[int]]:
    """Return the most likely continuation of each prompt, without the token that ended it.

    Args:
        model: In eval mode, on every rank.
        prompts: Token ids. Of one length when the adapter has virtual tokens.
        most: New tokens at most.
        ends: Token ids that end an answer.
        pad: The id to pad with.
        device: Where the model is.
        all_done: Tells whether every rank is done, when asked on every rank: under ZeRO-3 each forward pass is
            everyone's.

    """
    import torch

    virtual = model.active_peft_config.num_virtual_tokens if model.active_peft_config.is_prompt_learning else 0
    width = max(map(len, prompts))
    if virtual and any(len(prompt) != width for prompt in prompts):
        raise ValueError("with virtual tokens, the prompts of a batch must have one length")
    ids = torch.tensor([[pad] * (width - len(p)) + list(p) for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    # PEFT drops given positions when there are virtual tokens, and the model then counts from the first of those.
    inputs: dict[str, Any] = {} if virtual else {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    answers: list[list[int]] = [[] for _ in prompts]
    open_answers = set(range(len(prompts)))
    with torch.no_grad():
        output = model(input_ids=ids, attention_mask=mask, use_cache=True, **inputs)
        mask = torch.cat([mask.new_ones(len(prompts), virtual), mask], dim=1)
        for number in range(most):
            tokens = output.logits[:, -1].argmax(-1)
            for index in sorted(open_answers):
                token = int(tokens[index])
                if token in ends:
                    open_answers.discard(index)
                else:
                    answers[index].append(token)
            if number == most - 1 or all_done(not open_answers):
                break
            positions = mask.sum(1, keepdim=True)
            mask = torch.cat([mask, mask.new_ones(len(prompts), 1)], dim=1)
            # Past the prompt the virtual tokens are in the cache: PEFT's own forward would put them in again.
            output = model.get_base_model()(
                input_ids=tokens[:, None],
                attention_mask=mask,
                position_ids=positions,
                past_key_values=output.past_key_values,
                use_cache=True,
            )
    return answers
