"""The client half of a method: hooks around an ordinary training loop."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Final, Protocol

from fsllm_common.errors import TrainingFailed
from fsllm_common.section import Section

if TYPE_CHECKING:
    import torch

    from fsllm_common.plan import Plan

    Tensors = Mapping[str, torch.Tensor]


class Parameters(Section):
    """What a plan may say under ``algorithm.parameters``: a method's own, each with a default and a description."""


@dataclass(frozen=True, slots=True)
class Turn:
    """A stretch of a round's local work, by an optimizer that knows nothing of the turns before it."""

    start: Tensors
    """The adapter to begin with."""
    steps: int
    trained: frozenset[str] | None = None
    """The tensors that this turn trains, of those that the round trains; ``None``: all of them."""
    following: int = 0
    """Steps of the turns after this one, for those who watch."""
    learning_rate: float | None = None
    """``None``: the round's."""


class LocalStep(Protocol):
    """A step in the making, for a rule that takes it in its own way.

    All ranks call the same methods in the same order and see the same values: whole tensors, on CPU, in float32, by
    name, of what the turn trains.
    """

    number: int
    """1, 2, ... in its turn."""
    learning_rate: float

    def values(self) -> dict[str, torch.Tensor]:
        """Return the adapter as it is."""

    def write(self, values: Tensors) -> None:
        """Set these tensors of the adapter."""

    def loss(self) -> float:
        """Return the mean loss over the step's answer tokens, without dropout and without a gradient."""

    def gradients(self) -> dict[str, torch.Tensor]:
        """Return the gradient of the step's mean loss, and leave adapter and optimizer as they are."""

    def step(self) -> None:
        """Take the ordinary optimizer step, clipping and the rule's other hooks included."""

    def gradient_of(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the gradient, in the step just taken, of a tensor that is the rule's own (``LocalRule.inside``)."""


class LocalRule:
    """The client half. The base class is plain local training; a method overrides the hooks it needs.

    One object lives from ``receive`` to ``produce`` of one round, in every rank; another one tells what to evaluate.
    Tensors are the adapter's by their PEFT state-dict names, whole, on CPU, in float32, whatever precision and ZeRO
    stage the site trains with. The trainer gathers them only for a rule that overrides the hook, and calls every hook
    on every rank with the same values.
    """

    validates: ClassVar[bool] = False
    """It calls ``validate``, so that each site needs validation rows."""
    awaits_receipt: ClassVar[bool] = False
    """What a round leaves in ``private`` says what the server has been sent: it counts when the server has acknowledged
    the round's update. Until then, and for good where the update was refused or late, what stood there before does."""

    def __init__(self, plan: Plan, parameters: Parameters) -> None:
        self.plan = plan
        self.parameters = parameters
        self.validate: Callable[[Tensors], float] = _unmeasured
        """Returns the mean loss of an adapter over the answer tokens of the site's validation rows, the same in every
        rank. For ``turns``, between two of them; set before ``receive``."""
        self.private: dict[str, torch.Tensor] = {}
        """What the rule itself keeps at the site, by names of its own: filled before ``receive`` with what stood here
        after the site's last earlier round of this run, and kept when the round ends. After the server was restored
        from a back-up that may be a round which is yet to come."""
        self.round = 1
        """The round's number, and what it trains with; set before ``receive``. Before ``evaluated``: the number of the
        round that starts from the version."""
        self.learning_rate = plan.train.learning_rate
        self.site = 0
        """A number that follows from the site's training examples: its own, and the same in each round and rank."""
        self.trained: Sequence[str] = ()
        """The adapter's tensors that this round trains."""
        self.sent: frozenset[str] = frozenset()
        """Those of them that are sent and reduced; the others are the site's own."""
        self.model_digest = b""
        """Of the model that the round starts from, where each site makes it for itself: all have to agree on it."""

    def receive(self, base: Tensors, extra: Tensors) -> None:
        """See what the round starts from, before the first step.

        Args:
            base: The version's adapter, with the site's own tensors in the place of those of personal roles.
            extra: The version's other tensors (``Algorithm.extra``).

        """

    def inside(self, model: torch.nn.Module, device: torch.device) -> AbstractContextManager[None]:
        """Change the model's forward pass, by hooks, for the round's turns or for an evaluation.

        Entered after ``receive``, or after ``evaluated``. Tensors of the rule's own must be the same on every rank.
        """
        return nullcontext()

    def turns(self, base: Tensors, steps: int) -> Generator[Turn, Tensors, Tensors]:
        """Yield the round's turns, be sent the adapter that each leaves, and return the one to send and to keep.

        Args:
            base: As for ``receive``.
            steps: The plan's, or as many as its epochs take at this site.

        """
        return (yield Turn(base, steps))

    def loss(self, loss: torch.Tensor, labels: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Return the loss to differentiate, from the sum of a forward pass's token losses.

        What is returned is divided by the answer tokens of the whole step, over all passes and ranks.

        Args:
            loss: A scalar, the sum over the labels that are not -100.
            labels: (sequences, tokens), -100 where nothing is predicted.
            logits: (sequences, virtual tokens + tokens, vocabulary).

        """
        return loss

    def pair_loss(self, policy: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
        """Return the loss of a pass's preferences, summed; a rule that has this hook learns from nothing else.

        What is returned is divided by the pairs of the whole step. Plain local training learns the chosen answers.

        Args:
            policy: (pairs, 2), the log-probabilities of the chosen and of the rejected answers, given their prompts.
            reference: (pairs, 2), the base model's.

        """
        return -policy[:, 0].sum()

    def take_step(self, step: LocalStep) -> None:
        """Take a step; the ordinary one unless a method has its own."""
        step.step()

    def after_backward(self, name: str, gradient: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Return the gradient to use, from the step's own (the mean over its tokens), before clipping.

        Tensors are where the model trains.
        """
        return gradient

    def after_step(self, name: str, value: torch.Tensor) -> torch.Tensor:
        """Return the parameter to go on with, from its value after an optimizer step."""
        return value

    def produce(self, delta: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return what leaves the trainer.

        Args:
            delta: Local - base, of the tensors that are reduced in this round. More may be added, under names that
                ``Algorithm.extra`` gives.

        """
        return delta

    def evaluated(self, base: Tensors, extra: Tensors) -> Tensors:
        """Return the adapter to measure, and to export, at this site, whose private tensors are in ``private``.

        Args:
            base: As for ``receive``, of the version to measure.
            extra: As for ``receive``.

        """
        return base

    def beside(self) -> Tensors:
        """Return what ``inside`` mixes with the adapter, to be exported with it: ``rest/`` and ``gate/`` and a name.

        ``rest/`` are the tensors of a second adapter, ``gate/`` what is learned of the mixture in a layer. Called after
        ``turns``, or after ``evaluated``.
        """
        return {}


REST: Final = "rest/"
"""What the names of a second adapter's tensors begin with in ``LocalRule.beside``."""

GATE: Final = "gate/"
"""What the names of what mixes the two begin with there."""


def _unmeasured(adapter: Tensors) -> float:
    raise TrainingFailed("INTERNAL", "a rule measured an adapter where nobody can")


def changes(rule: LocalRule | type[LocalRule], hook: str) -> bool:
    """Tell whether a rule has a hook of its own, so that tensors are only gathered for one that looks at them."""
    return getattr(rule if isinstance(rule, type) else type(rule), hook) is not getattr(LocalRule, hook)
