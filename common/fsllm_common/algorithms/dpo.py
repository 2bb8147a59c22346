"""DPO (Rafailov et al. 2023, arXiv 2305.18290): FedAvg whose local loss is -log sigmoid(beta (gain(w) - gain(l))).

gain(y) = log pi(y) - log pi_ref(y) is what an answer has gained in log-probability on the reference, y_w the chosen and
y_l the rejected answer. The reference is the base model, for every round, as in OpenFedLLM (Ye et al. 2024, arXiv
2402.06954): the sites' common starting point, to which each has the key by switching its adapter off.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field, PositiveFloat

from fsllm_common.algorithms.fedavg import FedAvg
from fsllm_common.algorithms.local_rule import LocalRule, Parameters

if TYPE_CHECKING:
    import torch


class PreferenceParameters(Parameters):
    """DPO's own."""

    beta: PositiveFloat = Field(
        default=0.1, description="How dear it is to leave the base model; 0.1 to 0.5 are usual, small ones leave more."
    )


class DirectPreference(LocalRule):
    """Raise the chosen answers above the rejected ones."""

    parameters: PreferenceParameters

    def pair_loss(self, policy: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
        """Return the sum of DPO's losses."""
        import torch

        gain = policy - reference
        return -torch.nn.functional.logsigmoid(self.parameters.beta * (gain[:, 0] - gain[:, 1])).sum()


class DPO(FedAvg):
    """FedAvg of adapters that were trained on preferences."""

    name: ClassVar[str] = "dpo"
    parameters_type = PreferenceParameters
    local_rule = DirectPreference
