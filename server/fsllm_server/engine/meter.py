"""What the engine tells the metrics: read off the effects of each decision, so that the core knows nothing of it."""

from __future__ import annotations

from collections.abc import Iterable

from fsllm_common.telemetry.metrics import ServerMetrics
from fsllm_server.engine.effects import Effect, Notify
from fsllm_server.engine.events import Metric
from fsllm_server.engine.state import Commit, Run, Status


class Meter:
    """Counts what happens to runs."""

    def __init__(self, metrics: ServerMetrics) -> None:
        self._metrics = metrics

    def runs(self, runs: Iterable[Run]) -> None:
        """Count the runs by status."""
        statuses = [run.status for run in runs]
        for status in Status:
            self._metrics.runs.labels(status.value).set(statuses.count(status))

    def observe(self, run: Run, effects: list[Effect]) -> None:
        """Read a decision that has just been made."""
        for effect in effects:
            if isinstance(effect, Notify):
                self._notified(run, effect)
        if run.status.ended:
            self._metrics.forget_run(run.id)

    def rejected(self, reason: str) -> None:
        """Count a refused update."""
        self._metrics.updates_rejected.labels(reason).inc()

    def reported(self, run: Run, member: str, metrics: Iterable[Metric]) -> None:
        """Take what a member says of its work."""
        for metric in metrics:
            if metric.name == "tokens_per_second":
                self._metrics.tokens_per_second.labels(run.id, member).set(metric.value)
            elif metric.name == "epsilon":
                self._metrics.epsilon.labels(run.id, member).set(metric.value)

    def _notified(self, run: Run, effect: Notify) -> None:
        match effect.kind:
            case "update":
                self._metrics.updates_accepted.inc()
                self.reported(run, effect.subject, effect.metrics)
            case "failure":
                self._metrics.rounds.labels("failed").inc()
            case "commit" if effect.commit is not None:
                self._committed(run, effect.commit)

    def _committed(self, run: Run, commit: Commit) -> None:
        self._metrics.rounds.labels("committed").inc()
        self._metrics.round_seconds.observe(sum(seconds for _, seconds in commit.phase_seconds))
        for phase, seconds in commit.phase_seconds:
            self._metrics.phase_seconds.labels(phase).observe(seconds)
        for role in ("site", "evaluator"):
            losses = [
                (metric.value, metric.weight)
                for evaluation in commit.evaluations
                if evaluation.role == role
                for metric in evaluation.metrics
                if metric.name == "loss"
            ]
            if (weight := sum(weight for _, weight in losses)) > 0:
                self._metrics.loss.labels(run.id, role).set(sum(value * w for value, w in losses) / weight)
