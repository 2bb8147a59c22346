"""FedASK (2025, arXiv 2507.09990): sum_k p_k s_k B_k A_k found by two linear exchanges, a randomised SVD across sites.

First each site sends Y_k = s_k B_k (A_k O) for a random O (n, q), and Q = qr(sum_k p_k Y_k); then
Z_k = s_k A_k^T (B_k^T Q), and the mean product is Q (sum_k p_k Z_k)^T, exactly (but for the wire's rounding) where q is
no less than its rank. Both uploads only need adding up. An odd round of the run trains and makes the first exchange,
the even one after it makes the second: of the same sites, with the same shares, or Q would be the range of another
product.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from typing import TYPE_CHECKING, ClassVar, Final

from pydantic import Field

from fsllm.v1.tensors_pb2 import (
    TENSOR_ROLE_BASIS,
    TENSOR_ROLE_CORANGE,
    TENSOR_ROLE_RANGE,
    TENSOR_ROLE_TEST_MATRIX,
)
from fsllm_common.algorithms.algorithm import ADAPTER, Refusal
from fsllm_common.algorithms.fedavg import FedAvg
from fsllm_common.algorithms.layers import by_module, scale, truncated_svd
from fsllm_common.algorithms.local_rule import LocalRule, Parameters, Turn
from fsllm_common.errors import TrainingFailed
from fsllm_common.philox import stream, uniform

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch

    from fsllm.v1.tensors_pb2 import TensorRole
    from fsllm_common.algorithms.layers import Layer
    from fsllm_common.algorithms.local_rule import Tensors

SKETCH: Final = "sketch/"


class AskParameters(Parameters):
    """FedASK's own."""

    oversampling: int = Field(default=8, ge=0, description="p: sketches have rank + p columns.")


class TwoExchanges(LocalRule):
    """Train and send the first sketch; then send the second of what was trained."""

    def receive(self, base: Tensors, extra: Tensors) -> None:
        """Keep what the sketches are made with."""
        self._extra = extra

    def turns(self, base: Tensors, steps: int) -> Generator[Turn, Tensors, Tensors]:
        """Train in odd rounds only."""
        if self.round % 2 == 0:
            return base
        local = yield Turn(base, steps)
        self.private.clear()
        self.private.update({f"{self.round:08d}/{name}": value.clone() for name, value in local.items()})
        return local

    def produce(self, delta: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return this round's sketches. Those of each version are 0: what is clipped and rounded is the sketch."""
        trained = f"{self.round - 1 + self.round % 2:08d}/"
        kept = {name.removeprefix(trained): value for name, value in self.private.items() if name.startswith(trained)}
        if not kept:
            raise TrainingFailed("NOT_WANTED", f"this site has not trained in round {self.round - 1}")
        sketches = by_module(name for name in self._extra if name.startswith(SKETCH))
        made = {}
        for module, names in by_module(kept).items():
            if (sketch := sketches.get(module)) is None:
                continue
            a, b = (kept[names[key]].double() for key in ("A", "B"))
            s = scale(self.plan, a.shape[0])
            if self.round % 2:
                sent, product = sketch["Y"], b @ (a @ self._extra[sketch["O"]].double())
            else:
                sent, product = sketch["Z"], a.T @ (b.T @ self._extra[sketch["Q"]].double())
            made[sent] = (s * product).float()
        return made


class FedASK(FedAvg):
    """Sketches in place of factors."""

    name: ClassVar[str] = "fedask"
    departs = "made from the paper's two exchanges; a step takes two rounds of the run"
    adapter_kinds: ClassVar[tuple[str, ...] | None] = ("lora", "rslora")
    parameters_type = AskParameters
    parameters: AskParameters
    local_rule = TwoExchanges
    needs_layers = True
    any_rank: ClassVar[bool] = True
    in_pairs: ClassVar[bool] = True

    refuses: ClassVar[tuple[Refusal, ...]] = (
        Refusal(
            "algorithm.name, rounds",
            lambda method: method.plan.rounds % 2 == 1,
            "a round of fedask takes two of the run's, for its two exchanges: say an even number",
        ),
    )
    warns: ClassVar[tuple[Refusal, ...]] = (
        Refusal(
            "algorithm.name, wire.element_type",
            lambda method: method.plan.wire.element_type != "fp32",
            "this method's sketches are of whole factors, not of their change: what is rounded on the wire adds up "
            "over the rounds, and on bf16 hides changes of less than a few tenths of a per cent; fp32 keeps them",
        ),
    )

    def part(self, role: TensorRole.ValueType) -> str:
        """Return a part for each kind of sketch, or the adapter."""
        return _PARTS.get(role, ADAPTER)

    def moving(self, round_: int) -> tuple[str, ...]:
        """Return the sketch of the range, then that of the co-range."""
        return ("range",) if round_ % 2 else ("corange",)

    def trained(self, round_: int) -> tuple[str, ...]:
        """Return the adapter in odd rounds, though it is not what is sent."""
        return (ADAPTER,) if round_ % 2 else ()

    def remade(self, round_: int) -> tuple[str, ...]:
        """Return the orthonormal basis of the range, then the adapter."""
        return ("basis",) if round_ % 2 else (ADAPTER,)

    def extra(self, adapter: Mapping[str, tuple[int, ...]]) -> Mapping[str, npt.NDArray[np.float32]]:
        """Return a test matrix, an empty basis and empty sketches for each module."""
        import numpy as np

        made = {}
        for module, names in by_module(adapter).items():
            if not {"A", "B"} <= names.keys():
                continue
            wide, tall = adapter[names["B"]][0], adapter[names["A"]][1]
            columns = min(self.plan.adapter.rank + self.parameters.oversampling, wide, tall)
            test_matrix = uniform((tall, columns), 1.0, self.plan.seed, stream(f"test matrix/{module}"))
            made[f"{SKETCH}{module}.lora_O"] = test_matrix
            made[f"{SKETCH}{module}.lora_Q"] = np.zeros((wide, columns), np.float32)
            made[f"{SKETCH}{module}.lora_Y"] = np.zeros((wide, columns), np.float32)
            made[f"{SKETCH}{module}.lora_Z"] = np.zeros((tall, columns), np.float32)
        return made

    def combine_layer(self, layer: Layer) -> Mapping[str, npt.NDArray[np.float64]]:
        """Return a basis of the mean product's range, or the factors of its best approximation of the plan's rank."""
        if not layer.is_lora:
            return {}
        import numpy as np

        if layer.round % 2:
            return {"Q": np.linalg.qr(layer.mean("Y"))[0]}
        wide, tall = truncated_svd(layer.base["Q"], layer.mean("Z").T, layer.base["A"].shape[0])
        return {"A": tall, "B": wide / layer.scale}


_PARTS: Final = {
    TENSOR_ROLE_TEST_MATRIX: "test_matrix",
    TENSOR_ROLE_RANGE: "range",
    TENSOR_ROLE_CORANGE: "corange",
    TENSOR_ROLE_BASIS: "basis",
}
