"""What a plan may do but its author should know: above all, when noise drowns the signal."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from fsllm_common.accounting.budget import epsilon_of
from fsllm_common.plan.combinations import PROMPT_KINDS, method_of, noises, trains
from fsllm_common.plan.schema import Noise, Plan


@dataclass(frozen=True, slots=True)
class NoiseRatio:
    """How the noise in the mean of a round's updates compares with the largest signal there can be."""

    updates: int
    """K, the updates in the mean."""
    parameters: int
    """P, the numbers that an update has."""
    ratio: float
    """Expected norm of the mean's noise / clip norm: z sqrt(P / K). Above 1 the noise is larger than any signal."""

    @property
    def drowns(self) -> bool:
        """Whether the noise is larger than any signal."""
        return self.ratio > 1


def noise_ratio(plan: Plan, parameters: int, updates: int | None = None) -> NoiseRatio | None:
    """Return the ratio of noise to signal in a round's mean; None when the plan adds no noise.

    Each of K sites adds N(0, (zC)^2) to each of P coordinates of a delta of norm <= C (local noise). In the uniform
    mean of K, a coordinate's noise has the deviation zC / sqrt(K), so its norm is about zC sqrt(P / K), while the mean
    of the deltas has at most norm C. (Noise added once, by a trusted server, would be zC sqrt(P) / K: sqrt(K) less.)

    Args:
        plan: The plan.
        parameters: P, the numbers that an update has.
        updates: K; from the plan (buffer, size, number of sites, or quorum) when omitted.

    """
    noise = next(iter(noises(plan)), None)
    if noise is None:
        return None
    count = updates or plan.cohort.updates or plan.cohort.quorum
    return NoiseRatio(count, parameters, noise.multiplier * math.sqrt(parameters / count))


def synthetic_parameters(plan: Plan) -> int:
    """Return the elements of a noop run's tensors."""
    return int(plan.algorithm.synthetic.mebibytes * 2**20 / 4)


def warnings(plan: Plan, parameters: int | None = None) -> list[str]:
    """Return what the plan's author should know, in sentences.

    Args:
        plan: A valid plan.
        parameters: The numbers that an update has, where they are known; a noop run's are.

    """
    if parameters is None and not trains(plan):
        parameters = synthetic_parameters(plan)
    return [*_about_privacy(plan, parameters), *_about_the_rest(plan)]


def _about_privacy(plan: Plan, parameters: int | None) -> Iterator[str]:
    noise = next(iter(noises(plan)), None)
    if noise is None:
        return
    epsilon = epsilon_of(noise.multiplier, plan.rounds, noise.delta)
    yield (
        f"Each site spends epsilon {epsilon:.3g} at delta {noise.delta:g} in {plan.rounds} rounds (its delta against "
        "none; replacing it by another needs twice the multiplier for the same). This covers the deltas, not the "
        "losses, evaluations and times that a site reports."
    )
    yield _about_signal(plan, noise, parameters)
    if plan.wire.max_update_norm is not None:
        yield "wire.max_update_norm is compared with the noised delta, of norm multiplier x clip x sqrt(numbers)."


def _about_signal(plan: Plan, noise: Noise, parameters: int | None) -> str:
    # z sqrt(P / K) passes 1 where P = K / z^2.
    one = noise_ratio(plan, parameters or 1)
    assert one is not None  # noqa: S101 (there is a noise)
    even = f"{one.updates / noise.multiplier**2:.3g}"
    if parameters is None:
        return (
            f"The noise drowns the signal if an update has more than {even} numbers: with {one.updates} updates a "
            f"round, the norm of the mean's noise is {one.ratio:.3g} x sqrt(parameters) times the clip norm, and the "
            "signal's is at most 1."
        )
    found = f"over the {parameters} numbers of an update and {one.updates} updates a round, the norm of the mean's "
    found += f"noise is {one.ratio:.3g} times the clip norm, and the signal's is at most 1"
    if not one.drowns:
        return f"The noise leaves a signal to see: {found}."
    enough = math.ceil(noise.multiplier**2 * parameters)
    return f"The noise drowns the signal: {found}. They would be even with {enough} updates or {even} numbers."


def _about_the_rest(plan: Plan) -> Iterator[str]:
    if (method := method_of(plan)) is not None:
        yield from (f"{warning.keys}: {warning.why}." for warning in method.warns if warning.when(method))
        if method.personalised:
            yield f"algorithm.name {plan.algorithm.name}: each site measures a model of its own; evaluators have none."
    if plan.wire.element_type == "fp16":
        yield "wire.element_type fp16: values above 65504 are refused, those below 3e-8 lost; bf16 has no such limit."
    if plan.algorithm.weighting != "capped" and plan.algorithm.weight_cap != 1000:
        yield "algorithm.weight_cap has no effect unless algorithm.weighting is capped."
    if plan.cohort.quorum == 1:
        yield "cohort.quorum 1: a round may be one site's delta alone, plain to see for whoever has both versions."
    if plan.data.validation_fraction == 0 and trains(plan):
        yield "data.validation_fraction 0: sites have nothing to evaluate on, only evaluator daemons will report."
    if plan.adapter.kind in PROMPT_KINDS and plan.adapter.dropout > 0:
        yield "adapter.dropout has no effect with virtual tokens."
