"""What a valid plan means in numbers: parameters, bytes, privacy; and what its author should know."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from fsllm_common.accounting.budget import epsilon_of
from fsllm_common.embedded import embedded_model
from fsllm_common.plan import Plan
from fsllm_common.plan.advice import noise_ratio, synthetic_parameters, warnings
from fsllm_common.plan.combinations import SYNTHETIC_MODEL
from fsllm_common.plan.schema import Clip, Noise
from fsllm_common.tensors.manifest import WIDTH, WIRE_TYPES
from fsllm_operator.adapter_size import adapter_parameters, adapter_shapes, read_config
from fsllm_operator.rounds import size
from fsllm_operator.traffic import traffic

EMBEDDED_MODEL: Final = "embedded"


@dataclass(frozen=True, slots=True)
class Report:
    """The numbers of a plan; None where they can not be known."""

    plan: Plan
    parameters: int | None
    bytes_down: int | None
    """A site's, each round: one version, in the wire's element type."""
    bytes_up: int | None
    """A site's, each round: one update."""
    grows: bool
    """``bytes_down`` is of rounds of the quorum, and larger with each update more."""
    epsilon: float | None
    """After all rounds, for a site that takes part in each; None without noise."""
    delta: float | None
    noise_to_signal: float | None
    warnings: tuple[str, ...]

    def as_object(self) -> dict[str, Any]:
        """Return it for ``--json``."""
        down, up = self.bytes_down, self.bytes_up
        return {
            "valid": True,
            "parameters": self.parameters,
            "bytes_down_per_round_and_site": down,
            "bytes_up_per_round_and_site": up,
            "bytes_per_site": None if down is None or up is None else (down + up) * self.plan.rounds,
            "epsilon": self.epsilon,
            "delta": self.delta,
            "noise_to_signal": self.noise_to_signal,
            "warnings": list(self.warnings),
            "plan": self.plan.model_dump(mode="json"),
        }

    def rows(self) -> list[tuple[str, str]]:
        """Return the summary as (subject, sentence) pairs."""
        plan = self.plan
        rows = [
            ("name", plan.name),
            ("model", plan.model.name + (f", digest {plan.model.digest[:12]}..." if plan.model.digest else "")),
            ("adapter", self._adapter()),
            ("algorithm", f"{plan.algorithm.name}, updates weighted by {plan.algorithm.weighting}"),
            ("sites", self._cohort()),
            ("work", self._work()),
            ("wire", self._wire()),
        ]
        if self.epsilon is not None:
            rows.append(("privacy", self._privacy()))
        return rows

    def _adapter(self) -> str:
        adapter = self.plan.adapter
        if self.plan.model.name == SYNTHETIC_MODEL:
            return f"none: {self.plan.algorithm.synthetic.tensors} synthetic tensors, {self.parameters:,} parameters"
        count = "parameters unknown" if self.parameters is None else f"{self.parameters:,} parameters"
        targets = adapter.targets if isinstance(adapter.targets, str) else ", ".join(adapter.targets)
        match adapter.kind:
            case "lora" | "dora" | "rslora" | "lora-xs":
                return f"{adapter.kind}, rank {adapter.rank}, alpha {adapter.alpha:g}, on {targets}; {count}"
            case "vera":
                return f"vera, rank {adapter.rank}, on {targets}; {count}"
            case "oft":
                return f"oft, blocks of {adapter.block_size}, on {targets}; {count}"
        return f"{adapter.kind}; {count}"

    def _cohort(self) -> str:
        cohort = self.plan.cohort
        who = "every enrolled site" if cohort.sites is None else ", ".join(cohort.sites)
        wanted = "all that are ready" if cohort.size is None else f"{cohort.size} a round"
        return f"{who}; {wanted}, at least {cohort.quorum}"

    def _work(self) -> str:
        plan, train = self.plan, self.plan.train
        rounds = f"{plan.rounds} round{'s' if plan.rounds > 1 else ''}"
        if plan.model.name == SYNTHETIC_MODEL:
            return f"{rounds}, no training"
        each = f"{train.steps} steps" if train.steps else f"{train.epochs:g} epochs"
        return (
            f"{rounds} of {each} x {train.batch_size} sequences of up to {plan.data.max_length} tokens, "
            f"{train.optimizer} at {train.learning_rate:g}, {train.precision}"
        )

    def _wire(self) -> str:
        kind = self.plan.wire.element_type
        if self.bytes_down is None or self.bytes_up is None:
            return f"{kind}; give --model FOLDER or --parameters COUNT to see the bytes"
        total = size((self.bytes_down + self.bytes_up) * self.plan.rounds)
        least = "at least " if self.grows else ""
        each = f"{least}{size(self.bytes_down)} down and {size(self.bytes_up)} up a round and site"
        return f"{kind}: {each}; {least}{total} a site in all"

    def _privacy(self) -> str:
        clip = next(s for s in self.plan.pipeline if isinstance(s, Clip))
        noise = next(s for s in self.plan.pipeline if isinstance(s, Noise))
        text = (
            f"clip {clip.norm:g}, noise multiplier {noise.multiplier:g}: ε = {self.epsilon:.3g} at δ = {noise.delta:g} "
            f"after {self.plan.rounds} rounds"
        )
        if self.noise_to_signal is not None:
            text += f"; the noise in a round's mean is {self.noise_to_signal:.3g} times the largest signal"
        return text


def report(plan: Plan, model: Path | None = None, parameters: int | None = None) -> Report:
    """Return the numbers of a plan.

    Args:
        plan: A valid plan.
        model: The base model's folder, of which only config.json is read.
        parameters: The adapter's parameters, where they can not be computed.

    Raises:
        ModelUnusable: The folder has no config.json, or a target of the plan is not in the model.

    """
    count = parameters if parameters is not None else _parameters(plan, model)
    width = WIDTH[WIRE_TYPES[plan.wire.element_type]]
    travels = None if count is None else traffic(plan, _shapes(plan, model, count))
    noise = next((s for s in plan.pipeline if isinstance(s, Noise)), None)
    sent = None if travels is None else travels.up
    ratio = None if sent is None else noise_ratio(plan, sent)
    return Report(
        plan=plan,
        parameters=count,
        bytes_down=None if travels is None else travels.down * width,
        bytes_up=None if travels is None else travels.up * width,
        grows=travels is not None and travels.grows,
        epsilon=epsilon_of(noise.multiplier, plan.rounds, noise.delta) if noise else None,
        delta=noise.delta if noise else None,
        noise_to_signal=ratio.ratio if ratio else None,
        warnings=tuple(warnings(plan, sent)),
    )


def _parameters(plan: Plan, model: Path | None) -> int | None:
    if plan.model.name == SYNTHETIC_MODEL:
        return synthetic_parameters(plan)
    folder = _folder(plan, model)
    return adapter_parameters(plan.adapter, read_config(folder)) if folder is not None else None


def _shapes(plan: Plan, model: Path | None, count: int) -> dict[str, tuple[int, ...]]:
    """Return the adapter's tensors; one of all parameters where they can not be told apart."""
    folder = _folder(plan, model)
    shapes = adapter_shapes(plan.adapter, read_config(folder)) if folder is not None else None
    return shapes if shapes is not None else {"adapter": (count,)}


def _folder(plan: Plan, model: Path | None) -> Path | None:
    return _embedded_folder() if model is None and plan.model.name == EMBEDDED_MODEL else model


def _embedded_folder() -> Path | None:
    """Return the folder of the project's own model, where it is installed. Its package is not imported."""
    folder = embedded_model()
    return folder if folder is not None and (folder / "config.json").is_file() else None
