# mypy: ignore-errors
# Runs inside NVIDIA FLARE's own environment, as the custom code of a job: its types are not installed here.
"""FedAvg as FLARE has it, over so many made-up float32 arrays; nothing is saved, which its own persistor would do."""

import time
from pathlib import Path
from typing import Any

import numpy as np
from nvflare.app_common.abstract.fl_model import FLModel
from nvflare.app_common.workflows.fedavg import FedAvg


class Rounds(FedAvg):
    """FLARE's workflow with a model of its own making, which notes when each round ends."""

    def __init__(self, mebibytes: float, tensors: int, times: str, **options: Any) -> None:  # noqa: ANN401
        super().__init__(persistor_id="", **options)
        self._times = times
        self._elements = int(mebibytes * 2**20 / 4 / tensors)
        self._tensors = tensors

    def load_model(self) -> FLModel:
        """Return the initial arrays."""
        array = np.random.default_rng(1).standard_normal(self._elements, dtype=np.float32)
        return FLModel(params={f"synthetic.{at:05d}": array + np.float32(at) for at in range(self._tensors)})

    def save_model(self, model: FLModel) -> None:
        """Save nothing but the time."""
        with Path(self._times).open("a") as file:
            file.write(f"{time.time()}\n")
