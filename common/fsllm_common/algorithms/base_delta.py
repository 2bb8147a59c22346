"""What methods share that change the base: they append to a ledger what every module's weight has gained, as factors.

The base model itself is never changed, so that one in four bits stays what it is, and whoever joins late fetches the
entries that are there. A fresh LoRA starts in each round: A drawn anew, B = 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Final, TypeVar

from pydantic import Field

from fsllm.v1.tensors_pb2 import TENSOR_ROLE_BASE_DELTA
from fsllm_common.algorithms.algorithm import ADAPTER, BaseDelta, Refusal
from fsllm_common.algorithms.fedavg import FedAvg
from fsllm_common.algorithms.layers import Layer, by_module, truncated_svd
from fsllm_common.algorithms.local_rule import Parameters
from fsllm_common.philox import stream, uniform

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from fsllm.v1.tensors_pb2 import TensorRole
    from fsllm_common.plan import Plan


LEDGER: Final = "base_delta"
"""How the names of the ledger's entries begin, which are parts of a version, and those of their tensors."""

_Tensor = TypeVar("_Tensor")


def entry_name(round_: int) -> str:
    """Return the name of the part that a round appends."""
    return f"{LEDGER}/{round_:05d}"


def is_entry(name: str) -> bool:
    """Tell whether a part, or a tensor, is one of the ledger's."""
    return name.startswith(f"{LEDGER}/")


def gained(tensors: Mapping[str, _Tensor]) -> dict[str, list[tuple[_Tensor, _Tensor]]]:
    """Return what a version's ledger adds to each module: U (m, R) and V (R, n) of each entry, in their order."""
    found: dict[str, list[tuple[_Tensor, _Tensor]]] = {}
    entries: dict[str, list[str]] = {}
    for name in filter(is_entry, sorted(tensors)):
        entries.setdefault(name.split("/")[1], []).append(name)
    for entry in entries.values():
        for module, names in by_module(entry).items():
            found.setdefault(module, []).append((tensors[names["U"]], tensors[names["V"]]))
    return found


class LedgerParameters(Parameters):
    """Of all methods with a ledger."""

    ledger_rank: int = Field(
        default=0,
        ge=0,
        description="Beyond so many ranks the ledger is compressed to so many, by truncated SVD; 0: never, and exact.",
    )


class Ledger(FedAvg):
    """The ledger's arithmetic."""

    parameters_type = LedgerParameters
    parameters: LedgerParameters
    needs_layers = True
    warns: ClassVar[tuple[Refusal, ...]] = (
        Refusal(
            "algorithm.name, wire.element_type",
            lambda method: method.plan.wire.element_type != "fp32",
            "this method is exact but for what is rounded on the wire, and the sites' ledgers keep that: bf16 loses "
            "about 0.4 % of a round's change, fp16 0.05 % (fedex-lora more as its adapter grows); fp32 7 digits remain",
        ),
    )

    def part(self, role: TensorRole.ValueType) -> str:
        """Return the ledger, whose entries never move, or the adapter."""
        return LEDGER if role == TENSOR_ROLE_BASE_DELTA else ADAPTER

    def added_rank(self, ranks: Sequence[int]) -> int:
        """Return the rank of what a round adds; the sum of the sites' unless a method says otherwise."""
        return sum(ranks)

    def base_delta(self, ranks: Sequence[int], before: Sequence[int]) -> BaseDelta | None:
        """Return the round's entry; one that replaces all when there would be too much."""
        added, most = self.added_rank(ranks), self.parameters.ledger_rank
        if most and sum(before) + added > most:
            return BaseDelta(most, replaces=True)
        return BaseDelta(added)

    def entry(
        self, layer: Layer, wide: npt.NDArray[np.float64], tall: npt.NDArray[np.float64]
    ) -> dict[str, npt.NDArray[np.float64]]:
        """Return U and V for a gain of ``wide @ tall``, (m, R) and (R, n)."""
        import numpy as np

        before = [int(entry["V"].shape[0]) for entry in layer.base_delta]
        made = self.base_delta([update.rank for update in layer.updates], before)
        if made is not None and made.replaces:
            wide = np.concatenate([*(entry["U"] for entry in layer.base_delta), wide], axis=1)
            tall = np.concatenate([*(entry["V"] for entry in layer.base_delta), tall])
            wide, tall = truncated_svd(wide, tall, made.rank)
        return {"U": wide, "V": tall}


def fresh_a(plan: Plan, layer: Layer) -> npt.NDArray[np.float64]:
    """Return a new A (r, n) for the round after this one: uniform in +-1/sqrt(n), as PEFT draws it.

    Nothing but the plan's seed, the round and the module decides the numbers (``philox``).
    """
    import numpy as np

    shape = (int(layer.base["A"].shape[0]), int(layer.base["A"].shape[1]))
    return uniform(shape, shape[1] ** -0.5, plan.seed, stream(f"A/{layer.round}/{layer.module}")).astype(np.float64)
