"""FedRep (Collins et al. 2021, arXiv 2102.07078): FedPer, but a site trains its own part first, then the shared.

So the shared part is trained against what suits the site. Each has a turn of its own in every round.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field, PositiveFloat

from fsllm_common.algorithms.fedper import FedPer, PersonalParameters
from fsllm_common.algorithms.local_rule import LocalRule, Turn

if TYPE_CHECKING:
    from fsllm_common.algorithms.local_rule import Tensors


class RepresentationParameters(PersonalParameters):
    """FedRep's own."""

    personal_share: PositiveFloat = Field(
        default=2.0, description="Steps of the personal part for each of the shared one, which takes the plan's."
    )


class Alternate(LocalRule):
    """Train the personal part, then the shared one."""

    parameters: RepresentationParameters

    def turns(self, base: Tensors, steps: int) -> Generator[Turn, Tensors, Tensors]:
        """Train what is kept, and then what is sent."""
        personal = frozenset(self.trained) - self.sent
        first = max(1, math.ceil(steps * self.parameters.personal_share))
        fitted = yield Turn(base, first, trained=personal, following=steps)
        return (yield Turn(fitted, steps, trained=self.sent))


class FedRep(FedPer):
    """FedPer by turns."""

    name: ClassVar[str] = "fedrep"
    parameters_type = RepresentationParameters
    local_rule = Alternate
