"""The names of all metrics, one class per end. docs/metrics.md explains each.

Names follow Prometheus: a base unit as suffix (``_seconds``, ``_bytes``), ``_total`` for counters. Labels are bounded:
a role, a phase, a reason of ``errors.REASONS``, an order's kind, or a live run and its members, whose series are
removed when the run ends (``forget_run``). No label ever holds a site's data.
"""

import platform

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics
from prometheus_client.process_collector import ProcessCollector

from fsllm_common import __version__

# The _created series double the page and no dashboard of ours reads them.
disable_created_metrics()  # type: ignore[no-untyped-call]

MIB = 2**20
QUICK = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
"""Seconds: waits and transfers."""
SLOW = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800, 3600, 10800)
"""Seconds: phases, rounds and orders, from a benchmark's to a night of training."""
SIZES = (MIB // 4, MIB, 4 * MIB, 16 * MIB, 64 * MIB, 256 * MIB, 1024 * MIB, 4096 * MIB)
"""Bytes: payloads."""


class _End:
    """What both ends measure about themselves."""

    def __init__(self, end: str) -> None:
        self.registry = CollectorRegistry()
        self._end = end
        ProcessCollector(registry=self.registry)
        build = self._gauge("build_info", "1; the labels say what is running.", "version", "python")
        build.labels(__version__, platform.python_version()).set(1)
        self.certificate_expiry = self._gauge(
            "certificate_expiry_timestamp_seconds", "When a certificate in use ends, in Unix time.", "certificate"
        )

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"fsllm_{self._end}_{name}", text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(f"fsllm_{self._end}_{name}", text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        return Histogram(f"fsllm_{self._end}_{name}", text, labels, registry=self.registry, buckets=buckets)


class ServerMetrics(_End):
    """What the server measures, in its own registry (so that tests can make as many as they like)."""

    def __init__(self) -> None:
        super().__init__("server")
        # Runs and rounds.
        self.runs = self._gauge("runs", "Runs by status.", "status")
        self.rounds = self._counter("rounds_total", "Rounds that ended, by outcome: committed or failed.", "outcome")
        self.round_seconds = self._histogram("round_seconds", "Duration of committed rounds.", SLOW)
        self.phase_seconds = self._histogram("phase_seconds", "Duration of a round's phases.", SLOW, "phase")
        self.loss = self._gauge("loss", "Mean loss of the last evaluation, by role.", "run", "role")
        self.tokens_per_second = self._gauge("tokens_per_second", "Training speed, as reported last.", "run", "member")
        self.epsilon = self._gauge("epsilon", "Privacy a member has spent in a run, as it reports.", "run", "member")
        # Updates.
        self.updates_accepted = self._counter("updates_accepted_total", "Updates recorded.")
        self.updates_rejected = self._counter("updates_rejected_total", "Updates refused, by reason.", "reason")
        # Transfers.
        self.received_bytes = self._counter("received_bytes_total", "Payload bytes that members uploaded.")
        self.sent_bytes = self._counter("sent_bytes_total", "Payload bytes that members downloaded.")
        self.upload_seconds = self._histogram("upload_seconds", "From the slot to the receipt.", QUICK)
        self.upload_bytes = self._histogram("upload_bytes", "Payloads of recorded updates.", SIZES)
        self.upload_wait_seconds = self._histogram("upload_wait_seconds", "From the announcement to the slot.", QUICK)
        self.download_seconds = self._histogram("download_seconds", "A download that ran to its end.", QUICK)
        self.uploads_active = self._gauge("uploads_active", "Uploads that hold a slot.")
        self.uploads_queued = self._gauge("uploads_queued", "Uploads that wait for a slot.")
        # Members and calls.
        self.attached_members = self._gauge("attached_members", "Members with a live Attach stream, by role.", "role")
        self.calls = self._counter("calls_total", "Calls that ended; reason OK: well.", "method", "reason")
        self.enrollments = self._counter("enrollments_total", "Join tokens presented; reason OK: redeemed.", "reason")
        # The machine.
        self.disk_free_bytes = self._gauge("disk_free_bytes", "Free space where the state directory lies.")

    def forget_run(self, run: str) -> None:
        """Remove the series of a run that has ended."""
        for gauge in (self.loss, self.tokens_per_second, self.epsilon):
            gauge.remove_by_labels({"run": run})


class ClientMetrics(_End):
    """What a site's or an evaluator's daemon measures."""

    def __init__(self) -> None:
        super().__init__("client")
        # The link.
        self.attached = self._gauge("attached", "1 while the Attach stream is up.")
        self.attaches = self._counter("attaches_total", "Times the daemon attached.")
        self.sent_bytes = self._counter("sent_bytes_total", "Payload bytes uploaded.")
        self.received_bytes = self._counter("received_bytes_total", "Payload bytes downloaded.")
        self.upload_seconds = self._histogram("upload_seconds", "From Ready to the receipt.", QUICK)
        self.upload_wait_seconds = self._histogram("upload_wait_seconds", "From the announcement to Ready.", QUICK)
        self.upload_bytes = self._histogram("upload_bytes", "Payloads uploaded.", SIZES)
        self.download_seconds = self._histogram("download_seconds", "From the call to the last byte.", QUICK)
        # Orders.
        self.orders = self._counter("orders_total", "Orders that ended, by kind and outcome.", "kind", "outcome")
        self.order_seconds = self._histogram("order_seconds", "Duration of orders.", SLOW, "kind")
        self.round_start_seconds = self._histogram(
            "round_start_seconds", "From an order to train, sent with the published version, to the first step.", QUICK
        )
        self.round_finish_seconds = self._histogram(
            "round_finish_seconds", "From the last training step of a round to the receipt.", QUICK
        )
        # Training.
        self.steps = self._counter("training_steps_total", "Optimizer steps taken.")
        self.tokens = self._counter("training_tokens_total", "Tokens trained on.")
        self.training_loss = self._gauge("training_loss", "Training loss reported last.", "run")
        self.loss = self._gauge("loss", "Loss of the last evaluation.", "run")
        self.tokens_per_second = self._gauge("tokens_per_second", "Training speed reported last.")
        self.trainer_starts = self._counter("trainer_starts_total", "Times a trainer process was started.")
        self.trainer_prepares = self._counter(
            "trainer_prepares_total", "Times a trainer loaded a model and tokenised the data; once a run."
        )
        self.gpu_memory_bytes = self._gauge("gpu_memory_bytes", "Peak GPU memory of the trainer's last order.")
        self.trainer_memory_bytes = self._gauge("trainer_memory_bytes", "Resident memory of the trainer's processes.")
        # Privacy.
        self.epsilon = self._gauge("epsilon", "Privacy spent in a run.", "run")

    def forget_run(self, run: str) -> None:
        """Remove the series of a run that has ended."""
        for gauge in (self.training_loss, self.loss, self.epsilon):
            gauge.remove_by_labels({"run": run})
