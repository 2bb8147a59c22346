"""What an algorithm is: a server half that is pure numpy, and a client half of hooks around an ordinary training loop.

Both halves of a method stand in one file of this package (or of a third party's, registered under the entry point group
``fsllm.algorithms``). What the interface of FederatedScope-LLM (arXiv 2309.00363) calls prepare is ``extra`` and
``state`` here; its phases are ``moving``, ``trained`` and ``in_pairs``; aggregate is ``weigh``, the reducer with
``combine`` or ``combine_layer``, and ``apply``; redistribute is ``part`` and ``remade``: members fetch the parts that
they do not have, of their own rank.

What travels is data, not code: each tensor has a role, ``part`` says which part of a version tensors of a role are in,
and ``moving`` which parts a round changes. Sites train and send the tensors of the moving parts, and fetch only parts
that they do not have yet.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Final, NamedTuple

from fsllm.v1.tensors_pb2 import TENSOR_ROLE_LORA_A, TENSOR_ROLE_LORA_B
from fsllm_common.algorithms.local_rule import LocalRule, Parameters, changes

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from fsllm.v1.tensors_pb2 import TensorRole
    from fsllm_common.algorithms.layers import Layer
    from fsllm_common.plan import Plan

ADAPTER: Final = "adapter"
"""The part that tensors are in unless a method says otherwise."""

LORA_A: Final = "lora_A"
"""The part of LoRA's A, in methods that freeze it or send it on its own."""

FIXED: Final = "fixed"
"""The part of what an adapter's kind never trains, LoRA-XS's A and B: it travels once, with version 0."""

_LORA_XS_FACTORS: Final = (TENSOR_ROLE_LORA_A, TENSOR_ROLE_LORA_B)


FACTORS: Final = ("lora", "dora", "rslora")
"""Kinds of adapter that are a product of two trained factors, B A."""


@dataclass(frozen=True, slots=True)
class Block:
    """The same elements of everything that a server step may look at: float32 arrays of one shape (elements,)."""

    round: int
    """1, 2, ..."""
    base: npt.NDArray[np.float32]
    mean: npt.NDArray[np.float32]
    """Of the deltas: weighted, or what ``Algorithm.combine`` has made of them."""
    state: Mapping[str, npt.NDArray[np.float32]]
    """What ``Algorithm.state`` names, as the last round has left it. Overwritten in place by this one."""
    part: str = ADAPTER
    """Which part of the version these elements are of."""
    updates: int = 1
    """How many updates the mean is of."""


class BaseDelta(NamedTuple):
    """An entry of the base-delta ledger: what every module's base weight has gained, as factors of this rank."""

    rank: int
    replaces: bool = False
    """It stands for all entries before it, too."""


@dataclass(frozen=True, slots=True)
class Update:
    """What the server knows of one acknowledged update besides its tensors."""

    member: str
    examples: int
    tokens: int
    steps: int
    trusted: bool = False
    """An evaluator's: from data that the federation trusts, to compare the others with."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """A combination that a method refuses, or warns of: the plan's keys it is about, when it is there, and why not."""

    keys: str
    when: Callable[[Any], bool]
    """Of the algorithm, which knows its plan and its parameters."""
    why: str


class Algorithm(ABC):
    """The server half: how acknowledged deltas become the next global version.

    The object holds nothing between rounds: what a method keeps is said by ``state`` and ``remembers``, and stored with
    each version.
    """

    name: ClassVar[str]
    local_rule: ClassVar[type[LocalRule]] = LocalRule
    needs_trainer: ClassVar[bool] = True
    parameters_type: ClassVar[type[Parameters]] = Parameters
    server_learning_rate: ClassVar[float] = 1.0
    """The plan's, where it says nothing."""
    personal: frozenset[TensorRole.ValueType] = frozenset()
    """Roles that a site trains and keeps to itself; their part holds what each site begins with."""
    needs_products: ClassVar[bool] = False
    """STATS_THEN_SUM: ``weigh_by_products`` looks at the updates' inner products before they are summed."""
    needs_rows: ClassVar[bool] = False
    """BLOCK: ``combine`` looks at all updates' values of a block at once, in place of their weighted sum."""

    refuses: ClassVar[tuple[Refusal, ...]] = ()
    """What a plan may not combine with this method."""
    warns: ClassVar[tuple[Refusal, ...]] = ()
    """What it may, though its author should know."""
    departs: ClassVar[str] = ""
    """Where it is not as its paper has it, and why: for whoever chooses it."""
    adapter_kinds: ClassVar[tuple[str, ...] | None] = None
    """The kinds of adapter that it goes with; None: any."""
    needs_layers: bool = False
    """FACTOR: ``combine_layer`` makes a module's tensors from those of all sites at once, in place of ``apply`` and its
    learning rate. So it is under any method where the sites' ranks differ."""
    in_pairs: ClassVar[bool] = False
    """Each even round completes the odd one before it: by the same sites, which count the same."""
    needs_trusted: ClassVar[bool] = False
    """Evaluators train too: the others' updates are compared with theirs (``Update.trusted``)."""
    any_rank: ClassVar[bool] = False
    """Sites may have adapters of different ranks (``adapter.ranks``). What ``combine_layer`` leaves to the mean is
    filled up with zeros."""
    any_version: ClassVar[bool] = False
    """Updates of several parts mean the same whatever version they started from, so that ``cohort.buffer`` may be asked
    for. Of the adapter alone they do, unless ``needs_layers`` or ``needs_trusted``."""
    uniform: ClassVar[bool] = False
    """The method itself decides what an update counts for, whatever its site says of its data: a plan can not ask for
    a weighting."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.parameters = self.parameters_type.model_validate(plan.algorithm.parameters)
        if plan.adapter.ranks:
            self.needs_layers = True
        self.memory: list[float] = [0.0] * self.remembers()
        """Numbers that the server keeps from round to round, as ``remembers`` says; at first all are 0. A round's
        ``weigh`` (or ``weigh_by_products``), and ``apply`` to a part of one block, may put others in their place."""

    def rule(self) -> type[LocalRule]:
        """Return the client half: ``local_rule``, unless it depends on the parameters."""
        return self.local_rule

    @classmethod
    def learning_rate(cls, plan: Plan) -> float:
        """Return the server's learning rate: the plan's, or the method's own where the plan says nothing."""
        said = plan.algorithm.server_learning_rate
        return said if said is not None else cls.server_learning_rate

    @property
    def needs_plain_sgd(self) -> bool:
        """Whether the method is only right where a local step is y - rate x gradient, and nothing else."""
        return False

    @property
    def personalised(self) -> bool:
        """Whether each site has a model of its own, so that evaluators, who keep nothing, can not measure it."""
        return bool(self.personal) or changes(self.rule(), "evaluated")

    @property
    def leaves_adapter(self) -> bool:
        """Whether each site's own model is the base model with adapters, so that it can be exported there."""
        # What a rule changes in the forward pass is in no adapter, unless it says what is.
        return self.personalised and (not changes(self.rule(), "inside") or changes(self.rule(), "beside"))

    def reducer(self) -> str:
        """Return what is done with the updates: sum, rows, products, products then rows, or layers."""
        if self.needs_layers:
            return "layers"
        steps = [name for name, needed in (("products", self.needs_products), ("rows", self.needs_rows)) if needed]
        return " then ".join(steps) or "sum"

    # What travels.

    def part(self, role: TensorRole.ValueType) -> str:
        """Return the name of the part that tensors of this role are in."""
        return FIXED if self.plan.adapter.kind == "lora-xs" and role in _LORA_XS_FACTORS else ADAPTER

    def part_of(self, name: str, role: TensorRole.ValueType) -> str:
        """Return the name of the part that a tensor is in: its role's, unless a method tells tensors apart by name."""
        return self.part(role)

    def moving(self, round_: int) -> tuple[str, ...]:
        """Return the parts whose tensors are sent and reduced in this round (1, 2, ...)."""
        return (ADAPTER,)

    def trained(self, round_: int) -> tuple[str, ...]:
        """Return the parts whose tensors the sites train in this round: unless they send something else, what moves."""
        return self.moving(round_)

    def extra(self, adapter: Mapping[str, tuple[int, ...]]) -> Mapping[str, npt.NDArray[np.float32]]:
        """Return the tensors that version 0 holds besides the adapter's own, from whose shapes they are made.

        Their names begin with what their role is known by: ``control/`` and the like (``tensors.manifest.role_of``).
        """
        return {}

    def exported(self, tensors: Mapping[str, npt.NDArray[np.float32]]) -> Mapping[str, npt.NDArray[np.float32]]:
        """Return the adapter to use, from all tensors of a version: for a method whose version is something else."""
        return tensors

    # What the server makes of it.

    def state(self) -> Mapping[str, float]:
        """Return the server's state: names of tensors as large as the part "adapter", and each element's start."""
        return {}

    def remembers(self) -> int:
        """Return how many numbers ``memory`` has: few, kept as float32; for methods that do not ``needs_layers``."""
        return 0

    def least_updates(self) -> int:
        """Return how many updates a round needs for the method to be what it promises."""
        return 1

    @abstractmethod
    def weigh(self, updates: Sequence[Update]) -> list[float]:
        """Return each update's share in the sum, in the order given."""

    def weigh_by_products(self, updates: Sequence[Update], products: npt.NDArray[np.float64]) -> list[float]:
        """Return each update's share from the inner products of the updates; for ``needs_products``.

        Args:
            updates: In the order of the rows.
            products: (K, K), the updates' inner products over all tensors sent, in float64.

        """
        return self.weigh(updates)

    def combine(self, rows: npt.NDArray[np.float32], shares: Sequence[float]) -> npt.NDArray[np.float32]:
        """Return (elements,), what stands for the mean, from a block of all updates; for ``needs_rows``.

        Args:
            rows: (updates, elements). Those whose share is 0 are left out. May be overwritten.
            shares: Of these updates.

        """
        total: npt.NDArray[np.float32] = sum(
            row * row.dtype.type(share) for row, share in zip(rows, shares, strict=True)
        )
        return total

    def remade(self, round_: int) -> tuple[str, ...]:
        """Return the parts that ``combine_layer`` makes anew."""
        return self.moving(round_)

    def combine_layer(self, layer: Layer) -> Mapping[str, npt.NDArray[np.float64]]:
        """Return a module's next tensors by key, of the shapes of the base version's; for ``needs_layers``.

        U and V, where ``base_delta`` says that the round has some, are what is added to the module's base weight.
        Tensors whose keys are not returned become the mean of the sites' (``Layer.mean``).
        """
        return {}

    def base_delta(self, ranks: Sequence[int], before: Sequence[int]) -> BaseDelta | None:
        """Return the entry that this round adds to the base-delta ledger, if it adds one.

        Args:
            ranks: Of the updates.
            before: Of the entries that are there.

        """
        return None

    @abstractmethod
    def apply(self, block: Block) -> npt.NDArray[np.float32]:
        """Return a block of the next version, and leave the next state in ``block.state``.

        Called block by block, by several threads, so it must work elementwise; in float32 throughout, so that everybody
        who recomputes the round gets the same bits. Must change nothing but the state, or, of a part that is so small
        as to be one block, ``memory``.
        """
