"""A study's memory and its choices: Optuna over a SQLite file beside the study's, one command at a time.

Everything that a trial is, is in that file before the server hears of it, so that a command that is started again finds
the runs that an earlier one began, whenever that was ended.
"""

import fcntl
import json
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.exceptions import StorageInternalError
from optuna.pruners import BasePruner, NopPruner, SuccessiveHalvingPruner
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState
from pydantic import JsonValue
from sqlalchemy.exc import SQLAlchemyError

from fsllm_common.errors import FsllmError, InputError, PlanInvalid
from fsllm_operator.tune.space import Space, Values
from fsllm_operator.tune.study import Choices, Dimension, Study

RUNNING: Final = "running"
DONE: Final = "done"
PRUNED: Final = "pruned"
FAILED: Final = "failed"
_STATES: Final = {
    TrialState.RUNNING: RUNNING,
    TrialState.WAITING: RUNNING,
    TrialState.COMPLETE: DONE,
    TrialState.PRUNED: PRUNED,
    TrialState.FAIL: FAILED,
}


@dataclass(frozen=True, slots=True)
class Trial:
    """One trial as far as it is recorded."""

    number: int
    state: str
    values: Values
    plan: bytes = b""
    """As it is submitted: canonical JSON; empty when the command ended before it was made."""
    attempt: int = 0
    """Grows when the server no longer knows the run."""
    run_id: str = ""
    curve: Mapping[int, float] = field(default_factory=dict)
    """Round -> objective."""
    message: str = ""
    """Why it failed, or where it was ended."""
    ends: bool = False
    """It is to be pruned; its run may not be cancelled yet."""

    @property
    def rounds(self) -> int:
        """How many rounds it trained, as far as the objective tells."""
        return max(self.curve, default=0)

    @property
    def objective(self) -> float | None:
        """The objective after the last round that was measured."""
        return self.curve[self.rounds] if self.curve else None


class Search:
    """The trials of one study and what comes next. Made by ``open_search``."""

    def __init__(self, space: Space, storage: RDBStorage, key: str) -> None:
        self.space = space
        self._study = optuna.load_study(study_name=space.study.name, storage=storage, pruner=pruner(space.study))
        self._storage = storage
        self._id = storage.get_study_id_from_name(space.study.name)
        self._key = key
        self._distributions = {name: distribution(dimension) for name, dimension in space.study.space.items()}

    def trials(self) -> list[Trial]:
        """Return all trials, the first first."""
        return [_trial(frozen) for frozen in self._study.get_trials(deepcopy=False)]

    def trial(self, number: int) -> Trial:
        """Return one trial."""
        return _trial(self._frozen(number))

    def best(self) -> Trial | None:
        """Return the best trial that is done."""
        return best(self.trials(), self.space.study)

    def draw(self, number: int | None = None) -> Trial:
        """Draw a new trial, or what one has not drawn that an earlier command left; its plan is not made yet."""
        study = self._study
        at = len(study.get_trials(deepcopy=False)) if number is None else number
        # A sampler of its own for each trial: a study that is taken up again goes on as if it had never stopped, while
        # one sampler for all would begin its random numbers anew and draw the first trials' values again.
        study.sampler = sampler(self.space.study, at)
        asked = study.ask() if number is None else optuna.Trial(study, self._trial_id(number))
        values: Values = {}
        for name, found in self._distributions.items():
            drawn = _suggest(asked, name, found)
            dimension = self.space.study.space[name]
            values[name] = (
                dimension.choices[_labels(dimension).index(drawn)] if isinstance(dimension, Choices) else drawn
            )
        self.note(asked.number, values=values)
        return self.trial(asked.number)

    def note(self, number: int, **facts: JsonValue) -> None:
        """Record fields of a trial (``plan`` as text)."""
        for name, fact in facts.items():
            self._storage.set_trial_user_attr(self._trial_id(number), name, fact)

    def report(self, number: int, round_: int, objective: float) -> bool:
        """Record a round's objective and tell whether the trial had better end. One reported before changes nothing."""
        frozen = self._frozen(number)
        if round_ in frozen.intermediate_values:
            return False
        self._storage.set_trial_intermediate_value(self._trial_id(number), round_, objective)
        return self._study.pruner.prune(self._study, self._frozen(number))

    def finish(self, number: int) -> Trial:
        """End a trial whose run is done: its last objective is its value."""
        self._study.tell(number, self.trial(number).objective)
        return self.trial(number)

    def condemn(self, number: int) -> None:
        """Record that a trial is to be pruned. Its run is cancelled after this and before ``prune``."""
        self.note(number, message=f"not among the best after round {self.trial(number).rounds}", ends=True)

    def prune(self, number: int) -> Trial:
        """End a trial early."""
        self._study.tell(number, state=TrialState.PRUNED)
        return self.trial(number)

    def fail(self, number: int, message: str) -> Trial:
        """End a trial that came to nothing."""
        self.note(number, message=message)
        self._study.tell(number, state=TrialState.FAIL)
        return self.trial(number)

    def request_id(self, trial: Trial) -> str:
        """Return what a trial's run is submitted under: the same from every command, another for another study."""
        return f"{self.space.study.name}.{self._key}.{trial.number}.{trial.attempt}"

    def _trial_id(self, number: int) -> int:
        return self._storage.get_trial_id_from_study_id_trial_number(self._id, number)

    def _frozen(self, number: int) -> FrozenTrial:
        return self._storage.get_trial(self._trial_id(number))


@contextmanager
def open_search(space: Space) -> Iterator[Search]:
    """Open a study's memory, or make it, for this command alone.

    Raises:
        FsllmError: Another command runs this study; the file is another study's, or broken; the disk is full.

    """
    file = database(space.file)
    with _locked(space.file), _storage_errors(file):
        optuna.logging.disable_default_handler()
        storage = RDBStorage(f"sqlite:///{file}")
        try:
            yield Search(space, storage, _key(space, storage, file))
        finally:
            storage.remove_session()
            storage.engine.dispose()


def read_trials(space: Space) -> list[Trial]:
    """Return the trials of a study that another command may run at this time; none when it was not begun.

    Raises:
        FsllmError: The file is another study's, or broken.

    """
    file = database(space.file)
    if not file.exists():
        return []
    with _storage_errors(file):
        optuna.logging.disable_default_handler()
        storage = RDBStorage(f"sqlite:///{file}")
        try:
            names = [summary.study_name for summary in optuna.get_all_study_summaries(storage)]
            if space.study.name not in names:
                return []
            study = storage.get_study_id_from_name(space.study.name)
            _refuse_changed(space, storage.get_study_user_attrs(study), file)
            return [_trial(frozen) for frozen in storage.get_all_trials(study)]
        finally:
            storage.remove_session()
            storage.engine.dispose()


def database(study: Path) -> Path:
    """Return where a study's trials are: ``study.db`` beside ``study.yaml``."""
    return study.with_suffix(".db")


def best(trials: list[Trial], study: Study) -> Trial | None:
    """Return the best of the trials that are done; the first of equal ones."""
    done = [(t.objective, t) for t in trials if t.state == DONE and t.objective is not None]
    if not done:
        return None
    choose = min if study.objective.direction == "minimize" else max
    return choose(done, key=lambda pair: pair[0])[1]


def distribution(dimension: Dimension) -> BaseDistribution:
    """Return what Optuna draws a value from."""
    if isinstance(dimension, Choices):
        return CategoricalDistribution(_labels(dimension))
    if dimension.whole:
        return IntDistribution(int(dimension.low), int(dimension.high), dimension.log, int(dimension.step or 1))
    return FloatDistribution(float(dimension.low), float(dimension.high), dimension.log, dimension.step)


def sampler(study: Study, number: int) -> BaseSampler:
    """Return what draws one trial's values, always the same from the same seed, number and trials before."""
    seed = int(np.random.SeedSequence([study.seed, number]).generate_state(1)[0])
    if study.method == "tpe":
        return TPESampler(seed=seed, n_startup_trials=study.startup, multivariate=True, constant_liar=True)
    return RandomSampler(seed)


def pruner(study: Study) -> BasePruner:
    """Return what ends trials early: asynchronous successive halving (Li et al. 2020, arXiv 1810.05934), or nothing."""
    if study.halving is None:
        return NopPruner()
    return SuccessiveHalvingPruner(min_resource=study.halving.min_rounds, reduction_factor=study.halving.factor)


def _suggest(trial: optuna.Trial, name: str, found: BaseDistribution) -> Any:  # noqa: ANN401 (a value of the space)
    match found:
        case CategoricalDistribution():
            return trial.suggest_categorical(name, found.choices)
        case IntDistribution():
            return trial.suggest_int(name, found.low, found.high, step=found.step, log=found.log)
        case FloatDistribution():
            return trial.suggest_float(name, found.low, found.high, step=found.step, log=found.log)
    raise TypeError(type(found))


def _labels(dimension: Choices) -> list[str]:
    """Return the choices as JSON: Optuna keeps scalars only, and takes 1, 1.0 and true for the same."""
    return [json.dumps(choice, sort_keys=True) for choice in dimension.choices]


def _trial(frozen: FrozenTrial) -> Trial:
    facts = dict(frozen.user_attrs)
    return Trial(
        number=frozen.number,
        state=_STATES[frozen.state],
        values=facts.get("values", {}),
        plan=facts.get("plan", "").encode(),
        attempt=facts.get("attempt", 0),
        run_id=facts.get("run_id", ""),
        curve=dict(sorted(frozen.intermediate_values.items())),
        message=facts.get("message", ""),
        ends=facts.get("ends", False),
    )


def _key(space: Space, storage: RDBStorage, file: Path) -> str:
    """Return the study's own random word, made with the study. Refuses a file that another study has made."""
    study = optuna.create_study(
        study_name=space.study.name,
        storage=storage,
        direction=space.study.objective.direction,
        load_if_exists=True,
    )
    if "key" not in study.user_attrs:
        study.set_user_attr("definition", space.definition())
        study.set_user_attr("key", secrets.token_hex(8))
    _refuse_changed(space, study.user_attrs, file)
    key: str = study.user_attrs["key"]
    return key


def _refuse_changed(space: Space, facts: Mapping[str, Any], file: Path) -> None:
    now = space.definition()
    if changed := [key for key, value in facts.get("definition", {}).items() if now.get(key) != value]:
        raise PlanInvalid(
            f"{space.file}: {', '.join(changed)}: changed since {file} was begun",
            cure="Trials of different studies do not compare: change it back, or give the study another file name. "
            "trials, parallel and failed_trials may change.",
        )


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    descriptor = os.open(file, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(
                "STATE_LOCKED",
                f"Another `fsllm tune` runs {file}",
                cure="Wait for it, or stop it; `fsllm tune STUDY --show` shows how far it is.",
            ) from error
        yield
    finally:
        os.close(descriptor)


@contextmanager
def _storage_errors(file: Path) -> Iterator[None]:
    try:
        yield
    except (StorageInternalError, SQLAlchemyError) as error:
        # Optuna wraps what SQLAlchemy wraps; SQLite's own words are the innermost.
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        reason = "DISK_FULL" if "full" in str(cause) else "STATE_CORRUPT"
        cure = None if reason == "DISK_FULL" else "Move the file away: the study begins anew; its runs stay."
        raise FsllmError(reason, f"{file}: {cause}", cure=cure) from error
