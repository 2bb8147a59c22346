"""What a round costs a site besides its training: the time before the first step, and after the last."""

import time

from fsllm_client.trainer.orders import Advanced
from fsllm_common.telemetry.logs import get_logger
from fsllm_common.telemetry.metrics import ClientMetrics

log = get_logger()


class RoundClock:
    """Runs from an order to train, which the server sends as soon as the base version is published, to the receipt."""

    def __init__(self, metrics: ClientMetrics) -> None:
        self._metrics = metrics
        self._ordered = time.monotonic()
        self._last_step: float | None = None

    def advanced(self, step: Advanced) -> None:
        """Hear the trainer: it says 0 when it begins its first step, and the total when the last one is done."""
        if step.activity != "training":
            return
        if step.done == 0:
            seconds = time.monotonic() - self._ordered
            self._metrics.round_start_seconds.observe(seconds)
            log.info("first step", seconds_after_order=round(seconds, 3))
        elif step.done == step.total:
            self._last_step = time.monotonic()

    def acknowledged(self) -> None:
        """The receipt is here. Of a delta that was trained under an earlier order nothing is known."""
        if self._last_step is not None:
            seconds = time.monotonic() - self._last_step
            self._metrics.round_finish_seconds.observe(seconds)
            log.info("receipt", seconds_after_last_step=round(seconds, 3))
