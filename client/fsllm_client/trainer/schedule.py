"""The learning rate of a round: constant within it, scheduled over the run's rounds.

Local optimizers live for a round or carry on; either way the sites must agree on the rate, so it is a function of the
plan and the round's number alone.
"""

import math

from fsllm_common.plan import Plan


def learning_rate(plan: Plan, round_number: int) -> float:
    """Return the learning rate of round ``round_number`` (from 1).

    Warm-up rounds climb in equal steps and the first round after them has the full rate. Cosine and linear then fall
    to ``final_fraction`` of it, which the last round has. A round past the plan's last keeps the last rate.
    """
    train = plan.train
    peak = train.learning_rate
    if round_number <= train.warmup_rounds:
        return peak * round_number / (train.warmup_rounds + 1)
    if train.schedule == "constant":
        return peak
    falls = plan.rounds - train.warmup_rounds - 1  # from the first full round to the last
    passed = min(1.0, (round_number - train.warmup_rounds - 1) / falls) if falls > 0 else 0.0
    low = train.final_fraction
    if train.schedule == "linear":
        return peak * (1 - (1 - low) * passed)
    return peak * (low + (1 - low) * (1 + math.cos(math.pi * passed)) / 2)
