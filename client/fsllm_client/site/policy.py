"""The site's own policy: what a plan may ask of this site. A plan can not override a line of it.

The file is TOML (``policy.toml`` in the state folder by default; see docs/sites-and-security.md). A commented template
with the defaults is written on first start. The defaults let a run begin without a person's hand, because joining a
federation and naming a model under [models] are a person's acts already; they bound what a run may cost, and refuse
every model that the site has not named. A site whose security officer wants to see each run first sets
``accept.automatic = false``.
"""

import difflib
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, time
from pathlib import Path
from typing import Annotated, Final, Literal, NamedTuple, Self, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    Field,
    PositiveFloat,
    PositiveInt,
    PrivateAttr,
    ValidationError,
)

from fsllm_client.site.policy_template import TEMPLATE
from fsllm_client.site.state import DIRECTORY_MODE, FILE_MODE
from fsllm_common.algorithms import is_built_in
from fsllm_common.embedded import embedded_model
from fsllm_common.errors import ModelUnusable, PolicyRefused, Refused, SettingsInvalid
from fsllm_common.files import write_atomic
from fsllm_common.plan import Plan
from fsllm_common.plan.schema import AdapterKind, Clip, Noise
from fsllm_common.section import Section

Role = Literal["site", "evaluator"]
BUILT_IN: Final = "built-in"
MetricName = Literal["loss", "perplexity", "exact_match", "reward_accuracy", "train_loss", "delta_norm"]

MEASURED: Final[Mapping[str, MetricName]] = {
    "train_loss": "train_loss",
    "delta_norm": "delta_norm",
    "clipped": "delta_norm",
}
"""Of an update: what depends on the site's rows, and the name under which the policy allows it."""
UNMEASURED: Final = ("tokens_per_second", "seconds", "clip_norm", "noise_deviation", "epsilon")
"""Of an update: what does not."""

SYNTHETIC: Final = "synthetic"
EMBEDDED: Final = "embedded"


def _hours(text: str) -> str:
    match = re.fullmatch(r"(\d\d):(\d\d)-(\d\d):(\d\d)", text)
    if match is None:
        raise ValueError("hours are written as 'HH:MM-HH:MM', in the site's local time")
    for hour, minute in (match.groups()[:2], match.groups()[2:]):
        if (int(hour), int(minute)) != (24, 0) and (int(hour) > 23 or int(minute) > 59):
            raise ValueError(f"{hour}:{minute} is no time of day")
    return text


Hours = Annotated[str, AfterValidator(_hours)]


class Accept(Section):
    """Which runs this site takes part in."""

    automatic: bool = Field(default=True, description="false: each run waits for `fsllm-client accept RUN`.")
    algorithms: tuple[str, ...] = Field(
        default=(BUILT_IN,), description="plan: algorithm.name; built-in stands for every method of fsllm itself."
    )
    adapters: tuple[AdapterKind, ...] = Field(
        default=get_args(AdapterKind),
        description="plan: adapter.kind. The kinds of tensors that may leave.",
    )
    maximum_rank: PositiveInt | None = Field(
        default=None,
        description="plan: adapter.rank. Of a plan with adapter.ranks, the site takes the largest that is not above.",
    )
    maximum_rounds: PositiveInt = Field(default=1000, description="plan: rounds")
    maximum_steps: PositiveInt = Field(default=10_000, description="plan: train.steps, in one round")
    maximum_epochs: PositiveFloat = Field(default=20, description="plan: train.epochs, in one round")
    hours: tuple[Hours, ...] = Field(default=(), description="When this site trains; empty: always.")


class Leave(Section):
    """Which measured values may leave beside the tensors."""

    metrics: tuple[MetricName, ...] = Field(
        default=get_args(MetricName),
        description="Those not named are not sent. train_loss and delta_norm are never sent when the plan adds noise.",
    )


class Privacy(Section):
    """The least privacy a run must give. Runs of the noop algorithm read no data and are exempt."""

    require_noise: bool = Field(default=False, description="true: a plan without clip and noise is refused.")
    minimum_noise_multiplier: PositiveFloat | None = Field(default=None, description="plan: pipeline noise.multiplier")
    maximum_clip_norm: PositiveFloat | None = Field(default=None, description="plan: pipeline clip.norm")
    maximum_epsilon_per_run: PositiveFloat | None = None
    maximum_epsilon_total: PositiveFloat | None = Field(default=None, description="Over all runs of this site.")
    delta: float = Field(default=1e-5, gt=0, lt=1, description="The delta of maximum_epsilon_total.")


class Data(Section):
    """What this site's rows may be used for."""

    train: bool = Field(default=True, description="false: this site's rows are never trained on.")
    evaluate: bool = Field(default=True, description="false: nothing is measured on this site's rows.")
    minimum_rows: PositiveInt = Field(
        default=1,
        description="A run that would train on fewer rows is refused: a delta of few rows tells much of each.",
    )


class Refusal(NamedTuple):
    """One reason to refuse a plan: the policy's key and place, and what the plan asks."""

    key: str
    """E.g. accept.maximum_rounds."""
    message: str


@dataclass(frozen=True, slots=True)
class PlanNoise:
    """The clip and noise stages of a plan, as far as privacy needs them."""

    norm: float
    multiplier: float
    delta: float


def plan_noise(plan: Plan) -> PlanNoise | None:
    """Return the plan's clip norm, noise multiplier and delta; None when it adds no noise."""
    norm = next((stage.norm for stage in plan.pipeline if isinstance(stage, Clip)), None)
    noise = next((stage for stage in plan.pipeline if isinstance(stage, Noise)), None)
    if norm is None or noise is None:
        return None
    return PlanNoise(norm, noise.multiplier, noise.delta)


class Policy(Section):
    """The whole policy file."""

    models: dict[str, Path] = Field(default_factory=dict)
    accept: Accept = Accept()
    leave: Leave = Leave()
    privacy: Privacy = Privacy()
    data: Data = Data()

    _path: Path = PrivateAttr(default=Path("policy.toml"))
    _lines: dict[str, int] = PrivateAttr(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read and check a policy file.

        Raises:
            SettingsInvalid: It can not be read, a key is unknown, or a value is wrong; names the file and line.

        """
        try:
            text = path.read_text(encoding="utf-8")
            raw = tomllib.loads(text)
        except OSError as error:
            raise SettingsInvalid(f"The policy {path} can not be read: {error.strerror}") from error
        except ValueError as error:  # UnicodeDecodeError and TOMLDecodeError are; so is a number of too many digits
            raise SettingsInvalid(f"The policy {path} is not TOML: {error}") from error
        lines = _line_numbers(text)
        try:
            policy = cls.model_validate(raw)
        except ValidationError as error:
            problems = []
            for problem in error.errors(include_url=False):
                key = ".".join(str(part) for part in problem["loc"] if isinstance(part, str))
                place = f"line {lines[key]}: " if key in lines else ""
                what = _unknown(key) if problem["type"] == "extra_forbidden" else f"{problem['msg']}"
                problems.append(f"{place}{key}: {what}")
            raise SettingsInvalid(f"The policy {path}: " + "; ".join(problems)) from error
        policy._path, policy._lines = path, lines
        policy._resolve_models()
        return policy

    def model_folder(self, name: str) -> Path | None:
        """Return the folder of a base model; None for the synthetic model, which has none.

        'embedded' is the project's own tiny model, found in the installed package unless the policy names a folder.

        Raises:
            ModelUnusable: MODEL_MISSING: the policy names no such model, or its folder is not there.

        """
        if name == SYNTHETIC:
            return None
        folder = self.models.get(name)
        if folder is None and name == EMBEDDED:
            folder = embedded_model()
        if folder is None:
            known = ", ".join(sorted({*self.models, EMBEDDED}))
            raise ModelUnusable("MODEL_MISSING", f"{self._place('models')} names no model {name!r}; it has {known}")
        if not (folder / "config.json").is_file():
            raise ModelUnusable("MODEL_MISSING", f"{self._place(f'models.{name}')}: {folder} holds no config.json")
        return folder

    def refusals(self, plan: Plan, part: Role) -> list[Refusal]:
        """Return every reason to refuse ``plan``; none means that the policy accepts it.

        ``part`` is what the member would do in its run (``privacy.part_in``).

        The epsilons are not checked here: they need the accountant (``refuse_epsilon``).
        """
        found: list[Refusal] = []

        def refuse(key: str, asked: str) -> None:
            found.append(Refusal(key, f"{self._place(key)} = {self._value(key)}; the plan has {asked}"))

        accept, algorithm = self.accept, plan.algorithm.name
        if algorithm not in accept.algorithms and not (BUILT_IN in accept.algorithms and is_built_in(algorithm)):
            refuse("accept.algorithms", f"algorithm.name = {algorithm}")
        if plan.rounds > accept.maximum_rounds:
            refuse("accept.maximum_rounds", f"rounds = {plan.rounds}")
        if algorithm == "noop":
            return found
        if plan.adapter.kind not in accept.adapters:
            refuse("accept.adapters", f"adapter.kind = {plan.adapter.kind}")
        if part == "evaluator":
            return found
        if accept.maximum_rank is not None and min(plan.adapter.rank, *plan.adapter.ranks, 2**62) > accept.maximum_rank:
            refuse("accept.maximum_rank", f"adapter.rank = {plan.adapter.rank}")
        if not self.data.train:
            refuse("data.train", f"algorithm.name = {algorithm}, which trains")
        if plan.train.steps is not None and plan.train.steps > accept.maximum_steps:
            refuse("accept.maximum_steps", f"train.steps = {plan.train.steps}")
        if plan.train.epochs is not None and plan.train.epochs > accept.maximum_epochs:
            refuse("accept.maximum_epochs", f"train.epochs = {plan.train.epochs:g}")
        noise = plan_noise(plan)
        if noise is None:
            for key in (
                "require_noise",
                "minimum_noise_multiplier",
                "maximum_epsilon_per_run",
                "maximum_epsilon_total",
            ):
                if getattr(self.privacy, key):
                    refuse(f"privacy.{key}", "no noise stage in its pipeline")
        else:
            least, largest = self.privacy.minimum_noise_multiplier, self.privacy.maximum_clip_norm
            if least is not None and noise.multiplier < least:
                refuse("privacy.minimum_noise_multiplier", f"noise.multiplier = {noise.multiplier:g}")
            if largest is not None and noise.norm > largest:
                refuse("privacy.maximum_clip_norm", f"clip.norm = {noise.norm:g}")
        return found

    def rank(self, plan: Plan, part: Role) -> int:
        """Return the rank of this member's adapter: the plan's largest that the policy allows, or the least it has."""
        if part == "evaluator" or self.accept.maximum_rank is None:
            return plan.adapter.rank
        ranks = (plan.adapter.rank, *plan.adapter.ranks)
        return max((rank for rank in ranks if rank <= self.accept.maximum_rank), default=min(ranks))

    def refuse(self, plan: Plan, part: Role) -> None:
        """Refuse a plan that the policy does not allow.

        Raises:
            PolicyRefused: POLICY_REFUSED, with every line of the policy that the plan offends.

        """
        if found := self.refusals(plan, part):
            raise PolicyRefused("POLICY_REFUSED", "; ".join(refusal.message for refusal in found))

    def refuse_epsilon(self, run: float, total: float, *, planned: bool) -> None:
        """Refuse an epsilon beyond the policy's bounds.

        Args:
            run: What the run would have spent at the site.
            total: What all runs would have spent at the site.
            planned: True for a whole plan before it starts, False for the next round's release.

        Raises:
            PolicyRefused: POLICY_REFUSED for a plan, BUDGET_SPENT for a release; names the line and the value.

        """
        for key, limit, value, what in (
            ("privacy.maximum_epsilon_per_run", self.privacy.maximum_epsilon_per_run, run, "this run"),
            ("privacy.maximum_epsilon_total", self.privacy.maximum_epsilon_total, total, "all runs of this site"),
        ):
            if limit is not None and value > limit:
                when = (
                    f"all rounds of the plan would bring {what}" if planned else f"the next release would bring {what}"
                )
                reason = "POLICY_REFUSED" if planned else "BUDGET_SPENT"
                raise PolicyRefused(reason, f"{self._place(key)} = {limit:g}; {when} to an epsilon of {value:.3g}")

    def refuse_rows(self, rows: int) -> None:
        """Refuse to train on too few rows.

        Raises:
            PolicyRefused: POLICY_REFUSED.

        """
        if rows < self.data.minimum_rows:
            key = "data.minimum_rows"
            raise PolicyRefused(
                "POLICY_REFUSED", f"{self._place(key)} = {self._value(key)}; the run would train on {rows}"
            )

    def refuse_hour(self, now: datetime) -> None:
        """Refuse to train outside the site's hours, for now: a later round may be trained.

        Raises:
            Refused: POLICY_REFUSED.

        """
        hours = self.accept.hours
        if hours and not any(_within(now.time(), span) for span in hours):
            raise Refused(
                "POLICY_REFUSED", f"{self._place('accept.hours')} = {self._value('accept.hours')}; it is {now:%H:%M}"
            )

    def update_metrics(self, metrics: Mapping[str, float], *, noised: bool) -> dict[str, float]:
        """Return what may leave beside an update. With noise in the plan, nothing that was measured on the rows."""
        measured = () if noised else tuple(name for name, under in MEASURED.items() if under in self.leave.metrics)
        return {name: value for name, value in metrics.items() if name in UNMEASURED or name in measured}

    def loss_may_leave(self, plan: Plan) -> bool:
        """Return whether progress may carry the training loss."""
        return bool(self.update_metrics({"train_loss": 0.0}, noised=plan_noise(plan) is not None))

    def evaluation_metrics(self, plan: Plan) -> list[str]:
        """Return which of the plan's evaluation metrics may leave."""
        return [name for name in plan.evaluate.metrics if self.data.evaluate and name in self.leave.metrics]

    def _place(self, key: str) -> str:
        line = self._lines.get(key)
        return f"{self._path} line {line}: {key}" if line else f"{self._path} (default): {key}"

    def _value(self, key: str) -> str:
        section, _, name = key.partition(".")
        value = getattr(getattr(self, section), name)
        if isinstance(value, bool):
            return str(value).lower()
        return "[" + ", ".join(map(str, value)) + "]" if isinstance(value, tuple) else f"{value:g}"

    def _resolve_models(self) -> None:
        """Relative model folders are relative to the policy file."""
        for name, folder in self.models.items():
            try:
                self.models[name] = (self._path.parent / folder.expanduser()).resolve()
            except (RuntimeError, ValueError) as error:  # ~ of a user that is not there; a NUL
                raise SettingsInvalid(f"The policy {self._place(f'models.{name}')}: {folder}: {error}") from error


def ensure_policy(path: Path) -> bool:
    """Write the commented template where no policy file is. Return whether it was written."""
    if path.exists():
        return False
    path.parent.mkdir(mode=DIRECTORY_MODE, parents=True, exist_ok=True)
    write_atomic(path, TEMPLATE.encode(), mode=FILE_MODE)
    return True


def _line_numbers(text: str) -> dict[str, int]:
    """Return the line of each table and key of a TOML text, 1 for the first, by dotted name."""
    lines: dict[str, int] = {}
    table = ""
    for number, line in enumerate(text.splitlines(), 1):
        if header := re.match(r"\s*\[\s*([\w.\-\"' ]+?)\s*\]", line):
            table = re.sub(r"[\"' ]", "", header[1])
            lines.setdefault(table, number)
        elif key := re.match(r"\s*([\w.\-\"']+)\s*=", line):
            name = re.sub(r"[\"']", "", key[1])
            lines.setdefault(f"{table}.{name}" if table else name, number)
    return lines


def _unknown(key: str) -> str:
    section, _, name = key.rpartition(".")
    model = Policy.model_fields[section].annotation if section else Policy
    known = list(model.model_fields) if isinstance(model, type) and issubclass(model, BaseModel) else []
    near = difflib.get_close_matches(name, known, n=1)
    return f"unknown key; did you mean {near[0]!r}?" if near else f"unknown key; known here: {', '.join(known)}"


def _within(now: time, span: str) -> bool:
    """Return whether a time of day lies in 'HH:MM-HH:MM', which may pass midnight."""
    minute = now.hour * 60 + now.minute
    start, end = (int(part[:2]) * 60 + int(part[3:]) for part in span.split("-"))
    return start <= minute < end if start <= end else minute >= start or minute < end
