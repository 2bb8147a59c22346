"""Which of the adapter's tensors a round trains, sends, or leaves alone: what a method declares, by tensor name."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property

from fsllm_common.algorithms import Algorithm, algorithm_class
from fsllm_common.plan import Plan
from fsllm_common.tensors.manifest import role_of


class Sharing:
    """A method's declarations, for the tensors of one adapter.

    Args:
        plan: The run's plan.
        names: The adapter's tensors.

    """

    def __init__(self, plan: Plan, names: Iterable[str]) -> None:
        self._algorithm: Algorithm = algorithm_class(plan.algorithm.name)(plan)
        self._rounds = plan.rounds
        self._roles = {name: role_of(name) for name in names}

    @property
    def leaves_adapter(self) -> bool:
        """Whether each site has an adapter of its own, to be exported there."""
        return self._algorithm.leaves_adapter

    @cached_property
    def personal(self) -> frozenset[str]:
        """What each site trains and keeps."""
        return frozenset(name for name, role in self._roles.items() if role in self._algorithm.personal)

    def sent(self, round_number: int) -> frozenset[str]:
        """What is sent and reduced in a round."""
        return self._of(self._algorithm.moving(round_number)) - self.personal

    def trained(self, round_number: int) -> frozenset[str]:
        """What is trained in a round."""
        return self._of(self._algorithm.trained(round_number)) | self.personal

    def _of(self, parts: Sequence[str]) -> frozenset[str]:
        return frozenset(name for name, role in self._roles.items() if self._algorithm.part_of(name, role) in parts)

    @cached_property
    def fixed(self) -> frozenset[str]:
        """What no round of the run trains."""
        return frozenset(self._roles.keys() - self._ever)

    @cached_property
    def alternates(self) -> bool:
        """Whether some round trains less than another."""
        return any(self.trained(number) != self._ever for number in range(1, self._rounds + 1))

    @cached_property
    def _ever(self) -> frozenset[str]:
        return frozenset().union(*(self.trained(number) for number in range(1, self._rounds + 1)))
