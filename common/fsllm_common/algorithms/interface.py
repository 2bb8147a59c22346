"""What an algorithm is: a server half that is pure numpy, and a client half of hooks around an ordinary training loop.

Both halves of a method stand in one file of this package (or of a third party's, registered under the entry point group
``fsllm.algorithms``). The names of the server half are the paper's (FederatedScope-LLM, arXiv 2309.00363): ``prepare``,
``broadcast`` (done by the engine from what ``prepare`` returns), ``aggregate`` (``weigh`` and ``apply`` around the
engine's reducer) and ``redistribute``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from fsllm_common.section import Section

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch

    from fsllm_common.plan import Plan


class Parameters(Section):
    """What a plan may say under ``algorithm.parameters``: a method's own, each with a default and a description."""


@dataclass(frozen=True, slots=True)
class Block:
    """The same elements of everything that a server step may look at: float32 arrays of one shape (elements,)."""

    round: int
    """1, 2, ..."""
    base: npt.NDArray[np.float32]
    mean: npt.NDArray[np.float32]
    """Of the deltas, weighted."""
    state: Mapping[str, npt.NDArray[np.float32]]
    """What ``Algorithm.state`` names, as the last round has left it. Overwritten in place by this one."""


@dataclass(frozen=True, slots=True)
class Update:
    """What the server knows of one acknowledged update besides its tensors."""

    member: str
    examples: int
    tokens: int
    steps: int


class LocalRule:
    """The client half. The base class is plain local training; a method overrides the hooks it needs.

    One object lives from ``receive`` to ``produce`` of one round, in every rank. Tensors are the adapter's trainable
    ones by their PEFT state-dict names, whole, in float32, whatever precision and ZeRO stage the site trains with. The
    trainer gathers them only for a rule that overrides the hook, and calls every hook on every rank with the same
    values.
    """

    def __init__(self, plan: Plan, parameters: Parameters) -> None:
        self.plan = plan
        self.parameters = parameters

    def receive(self, base: Mapping[str, torch.Tensor]) -> None:
        """See the base version (on CPU), by name, before the first step."""

    def loss(self, loss: torch.Tensor, labels: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Return the loss to differentiate, from the sum of a forward pass's token losses.

        What is returned is divided by the answer tokens of the whole step, over all passes and ranks.

        Args:
            loss: A scalar, the sum over the labels that are not -100.
            labels: (sequences, tokens), -100 where nothing is predicted.
            logits: (sequences, virtual tokens + tokens, vocabulary).

        """
        return loss

    def after_backward(self, name: str, gradient: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Return the gradient to use, from the step's own (the mean over its tokens), before clipping."""
        return gradient

    def after_step(self, name: str, value: torch.Tensor) -> torch.Tensor:
        """Return the parameter to go on with, from its value after an optimizer step (on CPU)."""
        return value

    def produce(self, delta: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return what leaves the trainer, from ``delta`` = local - base (on CPU)."""
        return delta


class Algorithm(ABC):
    """The server half: how acknowledged deltas become the next global version.

    The object holds nothing between rounds: what a method keeps is named by ``state`` and stored with each version.
    """

    name: ClassVar[str]
    local_rule: ClassVar[type[LocalRule]] = LocalRule
    needs_trainer: ClassVar[bool] = True
    parameters_type: ClassVar[type[Parameters]] = Parameters
    server_learning_rate: ClassVar[float] = 1.0
    """The plan's, where it says nothing."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.parameters = self.parameters_type.model_validate(plan.algorithm.parameters)

    @classmethod
    def learning_rate(cls, plan: Plan) -> float:
        """Return the server's learning rate: the plan's, or the method's own where the plan says nothing."""
        said = plan.algorithm.server_learning_rate
        return said if said is not None else cls.server_learning_rate

    def state(self) -> Mapping[str, float]:
        """Return the server's state: names of tensors as large as the adapter, and what each element is at first."""
        return {}

    @abstractmethod
    def weigh(self, updates: Sequence[Update]) -> list[float]:
        """Return each update's share in the sum, in the order given. Shares are positive and sum to 1."""

    @abstractmethod
    def apply(self, block: Block) -> npt.NDArray[np.float32]:
        """Return a block of the next version, and leave the next state in ``block.state``.

        Called block by block, so it must work elementwise; in float32 throughout, so that everybody who recomputes the
        round gets the same bits. Must change nothing but the state.
        """
