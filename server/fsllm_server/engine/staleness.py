"""What an asynchronous round makes of updates that started from an older version (plan: ``cohort.buffer``).

FedBuff (Nguyen et al. 2022, arXiv 2106.06639) with the weights s of FedAsync (Xie et al. 2019, arXiv 1903.03934): the
shares that the algorithm gives are multiplied by a function of the staleness, and not brought to a sum of 1 again.

A buffer of one gives x <- x + a s (x_k - x_base): FedAsync's schedule, on changes, as most asynchronous federations
have it. The paper mixes models, x <- (1 - a s) x + a s x_k, which is a s (x_base - x) more: a stale update takes back a
part of what others have brought since its base. Changes are what every method's server step (momentum, moments) is made
for, and what sites send: no older version has to be read again.
"""

from __future__ import annotations

from collections.abc import Sequence

from fsllm_common.plan.schema import Buffer
from fsllm_server.engine.state import Order, Run, Update, Version


def discounted(
    buffer: Buffer | None, base: Version | None, updates: Sequence[Update], shares: list[float]
) -> list[float]:
    """Return the shares of updates in the round that follows ``base``."""
    if buffer is None or base is None:
        return shares
    round_ = base.number + 1
    return [share * weight(buffer, round_ - u.round) for u, share in zip(updates, shares, strict=True)]


def weight(buffer: Buffer, behind: int) -> float:
    """Return s(t) of an update that is so many rounds behind: 1 for one that is not."""
    match buffer.weight:
        case "polynomial":
            return float((1 + behind) ** -buffer.exponent)
        case "hinge":
            return 1 / (buffer.slope * max(0, behind - buffer.threshold) + 1)
        case "constant":
            return 1.0


def too_stale(run: Run, order: Order) -> bool:
    """Tell whether an order's update would not be wanted any more in the round to come."""
    buffer = run.plan.cohort.buffer
    return buffer is None or run.round + 1 - order.round > buffer.max_staleness
