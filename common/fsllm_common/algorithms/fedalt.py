"""FedALT (Bian et al. 2025, arXiv 2503.11880): y = W x + a(x) s B A x + (1 - a(x)) s B_R A_R x.

B A is the site's own LoRA, which no version overwrites; B_R A_R is the frozen rest of the world's, the mean of the
others' A and of their B; and the mixer a(x), the first of softmax(G x), is learned at the site, which keeps it. The
version is the mean of the LoRAs of the last round's K sites, and K goes with it: a site that was one of them takes its
own out of it, (K x - own) / (K - 1), so that all are sent the same. Every site counts the same. A site whose update
came too late for the round, or was refused, can not know it, and takes out too much of that version: leave
timing.collect_seconds unset.

The mixers' gradients have no part in the norm that the adapter's are clipped by.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, ClassVar, Final

from fsllm.v1.tensors_pb2 import TENSOR_ROLE_SCALAR
from fsllm_common.algorithms.algorithm import ADAPTER, Block, Refusal, Update
from fsllm_common.algorithms.fedavg import FedAvg
from fsllm_common.algorithms.local_rule import GATE, REST, LocalRule, LocalStep, Parameters, Turn

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch

    from fsllm.v1.tensors_pb2 import TensorRole
    from fsllm_common.algorithms.local_rule import Tensors
    from fsllm_common.plan import Plan

SCALARS: Final = "scalars"
UPDATES: Final = f"{SCALARS}/updates"
"""K, how many LoRAs the version is the mean of."""

_OWN: Final = "own/"
_ROUND: Final = "round"
_A, _B = ".lora_A.weight", ".lora_B.weight"


class RestOfWorld(LocalRule):
    """Train the site's own LoRA and its mixers beside the others' mean."""

    def __init__(self, plan: Plan, parameters: Parameters) -> None:
        super().__init__(plan, parameters)
        self._own: dict[str, torch.Tensor] = {}
        self._rest: dict[str, torch.Tensor] = {}
        self._gates: dict[str, torch.Tensor] = {}
        self._optimizer: torch.optim.Optimizer | None = None

    def receive(self, base: Tensors, extra: Tensors) -> None:
        """Take the version apart: into the own LoRA, and the rest's."""
        self._own = {name: self.private.get(f"{_OWN}{name}", tensor) for name, tensor in base.items()}
        count = float(extra[UPDATES])
        trained = self.private.get(_ROUND)
        if count > 1 and trained is not None and int(trained) == self.round - 1:
            self._rest = {name: (count * x - self._own[name]) / (count - 1) for name, x in base.items()}
        else:  # it was not among them
            # Tensors of its own: both are written to one file.
            self._rest = {name: tensor.clone() for name, tensor in base.items()}

    def turns(self, base: Tensors, steps: int) -> Generator[Turn, Tensors, Tensors]:
        """Go on with the own LoRA."""
        import torch

        own = yield Turn(self._own, steps)
        self.private.update({f"{_OWN}{name}": own[name] for name in self.trained})
        self.private.update({f"{GATE}{name}": gate.detach().cpu() for name, gate in self._gates.items()})
        self.private[_ROUND] = torch.tensor(self.round)
        return own

    @contextmanager
    def inside(self, model: torch.nn.Module, device: torch.device) -> Iterator[None]:
        """Have every LoRA layer mix."""
        import torch

        with ExitStack() as hooks:
            for name in sorted(name.removesuffix(_A) for name in self._own if name.endswith(_A)):
                layer = model.get_submodule(name)
                gate = self._gate(name).to(device, torch.float32, copy=True).requires_grad_()
                self._gates[name] = gate
                rest = self._rest[f"{name}{_A}"].to(device), self._rest[f"{name}{_B}"].to(device)
                for handle in _mix(layer, gate, *rest):
                    hooks.callback(handle.remove)
            gates = list(self._gates.values())
            adam = self.plan.train.optimizer == "adamw"
            self._optimizer = (torch.optim.AdamW if adam else torch.optim.SGD)(
                gates, lr=self.learning_rate, weight_decay=0.0
            )
            yield

    def take_step(self, step: LocalStep) -> None:
        """Take a step of the own LoRA, and of the mixers."""
        step.step()
        for gate in self._gates.values():
            gate.grad = step.gradient_of(gate)
        if self._optimizer is not None:
            self._optimizer.step()
            self._optimizer.zero_grad()

    def produce(self, delta: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Add the place of K, which is the server's to fill."""
        import torch

        return {**delta, UPDATES: torch.zeros(1)}

    def evaluated(self, base: Tensors, extra: Tensors) -> Tensors:
        """Return the own LoRA; the model mixes in the rest's."""
        self.receive(base, extra)
        return self._own

    def beside(self) -> Tensors:
        """Return the rest's LoRA, and the mixers G, (2, inputs) each."""
        gates = {name.removesuffix(_A): self._gate(name.removesuffix(_A)) for name in self._own if name.endswith(_A)}
        return {
            **{f"{REST}{name}": tensor for name, tensor in self._rest.items()},
            **{f"{GATE}{layer}": gate for layer, gate in gates.items()},
        }

    def _gate(self, layer: str) -> torch.Tensor:
        kept = self.private.get(f"{GATE}{layer}")
        return kept if kept is not None else self._own[f"{layer}{_A}"].new_zeros(2, self._own[f"{layer}{_A}"].shape[1])


def _mix(layer: Any, gate: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> Sequence[Any]:  # noqa: ANN401
    """Have a layer of PEFT's LoRA mix its own B A x with b a x, and return the hooks' handles."""
    import torch

    linear = torch.nn.functional.linear
    seen: list[torch.Tensor] = []

    def see(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        seen[:] = inputs[:1]

    def mix(_: torch.nn.Module, __: object, own: torch.Tensor) -> torch.Tensor:
        x = seen[0]
        share = linear(x.float(), gate).softmax(-1)[..., :1].to(own.dtype)
        return share * own + (1 - share) * linear(linear(x.to(own.dtype), a.to(own.dtype)), b.to(own.dtype))

    return layer.register_forward_pre_hook(see), layer.lora_B["default"].register_forward_hook(mix)


class FedALT(FedAvg):
    """The mean of the sites' LoRAs themselves, and how many they were."""

    name: ClassVar[str] = "fedalt"
    departs = "sites are sent the mean of all, and take their own part out themselves, so that all are sent the same"
    adapter_kinds: ClassVar[tuple[str, ...] | None] = ("lora", "rslora")
    local_rule = RestOfWorld
    uniform = True
    refuses: ClassVar[tuple[Refusal, ...]] = (
        Refusal(
            "algorithm.name, algorithm.server_learning_rate",
            lambda method: method.plan.algorithm.server_learning_rate not in (None, 1.0),
            "fedalt's version is the mean of the sites' LoRAs themselves, out of which each takes its own: leave the "
            "rate out",
        ),
        Refusal(
            "algorithm.name, cohort.over_selection",
            lambda method: method.plan.cohort.over_selection > 1,
            "fedalt's sites take their own LoRA out of the version, and could not know that theirs came too late to be "
            "in it: say over_selection: 1",
        ),
        Refusal(
            "algorithm.name, pipeline",
            lambda method: bool(method.plan.pipeline),
            "fedalt's sites take their own LoRA out of the version, which would hold it clipped and noised, and not as "
            "they know it: leave the pipeline out, or take another method",
        ),
    )

    def part(self, role: TensorRole.ValueType) -> str:
        """Return K's part, or the adapter's."""
        return SCALARS if role == TENSOR_ROLE_SCALAR else super().part(role)

    def moving(self, round_: int) -> tuple[str, ...]:
        """Return both."""
        return (ADAPTER, SCALARS)

    def extra(self, adapter: Mapping[str, tuple[int, ...]]) -> Mapping[str, npt.NDArray[np.float32]]:
        """Return K, which is 0 before the first round."""
        import numpy as np

        return {UPDATES: np.zeros(1, np.float32)}

    def weigh(self, updates: Sequence[Update]) -> list[float]:
        """Return the same share for all."""
        return [1 / len(updates)] * len(updates)

    def apply(self, block: Block) -> npt.NDArray[np.float32]:
        """Return the mean of the LoRAs, x + mean(own - x), or K."""
        if block.part == SCALARS:
            return 0 * block.base + block.base.dtype.type(block.updates)
        return block.base + block.mean
