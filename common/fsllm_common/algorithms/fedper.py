"""FedPer (Arivazhagan et al. 2019, arXiv 1912.00818): some of the model is each site's own, the rest is averaged.

Both are trained together. The paper's personal part is a network's last layers; an adapter's is the tensors of one
role: LoRA's B (which makes it FedSA-LoRA), its A, or DoRA's magnitudes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Final, Literal

from pydantic import Field

from fsllm.v1.tensors_pb2 import TENSOR_ROLE_LORA_A, TENSOR_ROLE_LORA_B, TENSOR_ROLE_MAGNITUDE
from fsllm_common.algorithms.algorithm import FACTORS, Refusal
from fsllm_common.algorithms.fedavg import FedAvg
from fsllm_common.algorithms.local_rule import Parameters

if TYPE_CHECKING:
    from fsllm.v1.tensors_pb2 import TensorRole
    from fsllm_common.plan import Plan

Personal = Literal["lora_A", "lora_B", "magnitude"]

_ROLES: Final[dict[Personal, TensorRole.ValueType]] = {
    "lora_A": TENSOR_ROLE_LORA_A,
    "lora_B": TENSOR_ROLE_LORA_B,
    "magnitude": TENSOR_ROLE_MAGNITUDE,
}


class PersonalParameters(Parameters):
    """FedPer's own."""

    personal: Personal = Field(default="lora_B", description="Whose tensors stay at their site.")


class FedPer(FedAvg):
    """The tensors of one role are personal."""

    name: ClassVar[str] = "fedper"
    parameters_type = PersonalParameters
    parameters: PersonalParameters
    refuses: ClassVar[tuple[Refusal, ...]] = (
        Refusal(
            "algorithm.parameters.personal, adapter.kind",
            lambda method: (
                method.plan.adapter.kind not in (("dora",) if method.parameters.personal == "magnitude" else FACTORS)
            ),
            "this kind of adapter has no such tensors to keep at a site",
        ),
    )

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan)
        self.personal = frozenset({_ROLES[self.parameters.personal]})

    def part(self, role: TensorRole.ValueType) -> str:
        """Return a part of its own for what is personal."""
        return "personal" if role in self.personal else super().part(role)
