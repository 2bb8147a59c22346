"""A committed round in a few numbers: what the watcher's table, `run show` and the exported card all print."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from fsllm.v1.control_pb2 import Commit
from fsllm.v1.federation_pb2 import Metric

SCOPES: Final = {"site": "validation", "evaluator": "held-out"}
"""Who measured, by role: sites on their own validation split, evaluators on the common held-out file."""


@dataclass(frozen=True, slots=True)
class Round:
    """One committed round. Means are weighted by what stands behind each value."""

    number: int
    contributors: tuple[str, ...]
    examples: int
    tokens: int
    payload_bytes: int
    seconds: float
    train_loss: float | None
    metrics: dict[tuple[str, str], float] = field(default_factory=dict)
    """(scope, metric) -> mean, e.g. ("held-out", "loss")."""


def summarise(commit: Commit) -> Round:
    """Return a commit's numbers."""
    metrics: dict[tuple[str, str], float] = {}
    for role, scope in SCOPES.items():
        reported = [metric for m in commit.metrics if m.role == role for metric in m.metrics]
        for name in sorted({metric.name for metric in reported}):
            value = mean(reported, name)
            if value is not None:
                metrics[scope, name] = value
        # The mean of perplexities is not the perplexity of the mean.
        if (scope, "perplexity") in metrics and (scope, "loss") in metrics:
            metrics[scope, "perplexity"] = _exp(metrics[scope, "loss"])
    contributions = sorted(commit.contributions, key=lambda c: c.member)
    return Round(
        number=commit.round,
        contributors=tuple(c.member for c in contributions),
        examples=sum(c.examples for c in contributions),
        tokens=sum(c.tokens for c in contributions),
        payload_bytes=sum(c.payload_bytes for c in contributions),
        seconds=sum(commit.phase_seconds.values()),
        train_loss=mean(
            [
                Metric(name="train_loss", value=metric.value, weight=c.weight)
                for c in contributions
                for metric in c.metrics
                if metric.name == "train_loss"
            ],
            "train_loss",
        ),
        metrics=metrics,
    )


def mean(metrics: Iterable[Metric], name: str) -> float | None:
    """Return the weighted mean of the metrics of this name; unweighted ones count for 1. None when there is none."""
    chosen = [(m.value, m.weight if m.weight > 0 else 1.0) for m in metrics if m.name == name]
    total = sum(weight for _, weight in chosen)
    return sum(value * weight for value, weight in chosen) / total if total else None


def columns(rounds: Iterable[Round]) -> list[tuple[str, str]]:
    """Return the (scope, metric) pairs that any of the rounds has: held-out first, loss first."""
    order = ("loss", "perplexity", "exact_match")
    found = {key for r in rounds for key in r.metrics}
    return sorted(found, key=lambda k: (k[0] != "held-out", order.index(k[1]) if k[1] in order else len(order), k[1]))


def number(value: float | None) -> str:
    """Return a metric as people read it."""
    if value is None:
        return "-"
    if math.isinf(value) or abs(value) >= 10_000:
        return f"{value:.3g}"
    return f"{value:.4f}"


def size(value: int) -> str:
    """Return bytes with a binary unit."""
    amount = float(value)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if amount < 1024:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1024
    return f"{amount:.1f} TiB"


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf
