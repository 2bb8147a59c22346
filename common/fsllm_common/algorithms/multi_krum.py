"""Multi-Krum (Blanchard et al. 2017, arXiv 1703.02757): the mean of the updates with the smallest Krum scores."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, PositiveInt

from fsllm_common.algorithms.krum import Krum
from fsllm_common.algorithms.robust import ByzantineParameters


class MultiKrumParameters(ByzantineParameters):
    """Multi-Krum's own."""

    selected: PositiveInt | Literal["most"] = Field(
        default="most",
        description="How many updates to take the mean of; most: K - f - 2, as many as there is proof for.",
    )


class MultiKrum(Krum):
    """Krum's scores; the mean of several instead of the best alone."""

    name: ClassVar[str] = "multi-krum"
    parameters_type = MultiKrumParameters
    parameters: MultiKrumParameters

    def least_updates(self) -> int:
        """Return Krum's, and enough that no bad one need be among those selected."""
        selected = self.parameters.selected
        return max(super().least_updates(), self.parameters.byzantine + (0 if selected == "most" else selected))

    def chosen(self, updates: int) -> int:
        """Return the parameter, or the most."""
        selected = self.parameters.selected
        return updates - self.parameters.byzantine - 2 if selected == "most" else selected
