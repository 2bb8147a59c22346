"""No training at all: each site sends a constant delta of the plan's synthetic size.

It serves benchmarks and load tests: everything but the trainer is real, and the result has a closed form.
"""

from __future__ import annotations

from typing import ClassVar

from fsllm_common.algorithms.fedavg import FedAvg


class Noop(FedAvg):
    """FedAvg over made-up deltas; needs no trainer."""

    name: ClassVar[str] = "noop"
    needs_trainer: ClassVar[bool] = False
