"""What a study would cost, before anything is started: rounds, bytes, privacy."""

from dataclasses import dataclass
from typing import Any

from fsllm_common.accounting.budget import epsilon_of
from fsllm_common.plan.schema import Noise, Plan
from fsllm_operator.plan_report import Report, report
from fsllm_operator.rounds import size
from fsllm_operator.tune.space import Space, value_text
from fsllm_operator.tune.study import Choices, Dimension


@dataclass(frozen=True, slots=True)
class Cost:
    """The most that a study can take, when no trial ends early."""

    space: Space
    rounds: int
    bytes_per_site: int | None
    """None where an adapter's parameters can not be known."""
    epsilon: float | None
    """For a site that takes part in every round of every trial; None without noise."""
    delta: float | None
    warnings: tuple[str, ...]

    def as_object(self) -> dict[str, Any]:
        """Return it for ``--json``."""
        study = self.space.study
        return {
            "valid": True,
            "study": study.name,
            "method": study.method,
            "objective": study.objective.model_dump(mode="json"),
            "space": {key: dimension.model_dump(mode="json") for key, dimension in study.space.items()},
            "rungs": list(self.space.rungs()),
            "trials": study.trials,
            "rounds": self.rounds,
            "bytes_per_site": self.bytes_per_site,
            "epsilon": self.epsilon,
            "delta": self.delta,
            "warnings": list(self.warnings),
        }

    def rows(self) -> list[tuple[str, str]]:
        """Return it as (subject, sentence) pairs."""
        study = self.space.study
        objective = study.objective
        rows = [
            ("study", f"{study.name}: {study.plan}, {study.trials} trials, {study.parallel} at a time"),
            ("objective", f"{objective.direction} the {objective.key[0]} {objective.metric} after the last round"),
            ("method", self._method()),
            *((key, dimension_text(dimension)) for key, dimension in study.space.items()),
            ("cost", f"at most {self.rounds} rounds: {study.trials} trials" + self._bytes()),
        ]
        if self.epsilon is not None:
            rows.append(
                ("privacy", f"at most ε = {self.epsilon:.3g} at δ = {self.delta:g} a site, over all trials together")
            )
        return rows

    def _method(self) -> str:
        study = self.space.study
        words = {
            "random": "random search",
            "halving": "random search",
            "tpe": f"Bayesian search (TPE) after {study.startup} random trials",
        }[study.method]
        if study.halving is None:
            return words
        rungs = ", ".join(map(str, self.space.rungs()))
        return f"{words}; after rounds {rungs} only the best of each {study.halving.factor} go on (successive halving)"

    def _bytes(self) -> str:
        return "" if self.bytes_per_site is None else f", at most {size(self.bytes_per_site)} a site"


def cost(space: Space) -> Cost:
    """Work out what a study would cost at the dearest of its corners."""
    reports = [report(plan) for plan in space.corners()]
    study = space.study
    rounds = max(found.plan.rounds for found in reports)
    sums = [_bytes(found) for found in reports]
    known = [value for value in sums if value is not None]
    noises = [(found.plan, noise) for found in reports if (noise := _noise(found.plan)) is not None]
    delta = min((noise.delta for _, noise in noises), default=None)
    return Cost(
        space=space,
        rounds=study.trials * rounds,
        bytes_per_site=study.trials * max(known) if len(known) == len(sums) else None,
        epsilon=max(
            (epsilon_of(noise.multiplier, study.trials * plan.rounds, delta) for plan, noise in noises if delta),
            default=None,
        ),
        delta=delta,
        warnings=tuple(dict.fromkeys(warning for found in reports for warning in found.warnings)),
    )


def dimension_text(dimension: Dimension) -> str:
    """Return what a key may be."""
    if isinstance(dimension, Choices):
        return "one of " + ", ".join(map(value_text, dimension.choices))
    words = f"{value_text(dimension.low)} to {value_text(dimension.high)}"
    if dimension.whole:
        words += ", whole numbers"
    if dimension.step is not None:
        words += f", in steps of {value_text(dimension.step)}"
    return words + (", evenly by its logarithm" if dimension.log else "")


def _bytes(found: Report) -> int | None:
    if found.bytes_down is None or found.bytes_up is None:
        return None
    return (found.bytes_down + found.bytes_up) * found.plan.rounds


def _noise(plan: Plan) -> Noise | None:
    return next((stage for stage in plan.pipeline if isinstance(stage, Noise)), None)
