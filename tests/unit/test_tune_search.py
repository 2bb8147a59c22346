"""A study's memory, and a whole study against a server that a test makes up."""

import contextlib
import itertools
import json
import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from control_harness import connected
from optuna.storages import RDBStorage
from sqlalchemy import Engine, event
from tune_harness import STUDY, Quiet, Server, write_study

from fsllm.v1 import control_pb2 as control
from fsllm_common.errors import FsllmError, PlanInvalid
from fsllm_common.plan import plan_from_file
from fsllm_operator.tune.optimise import Optimiser
from fsllm_operator.tune.plot import height, so_far, write_plot
from fsllm_operator.tune.search import Trial, best, open_search, read_trials
from fsllm_operator.tune.space import Space
from fsllm_operator.tune.table import study_object, trials_table, write_best

HALVING = "method: halving\nhalving: {factor: 2}\ntrials: 4\n"
CURVES = ((1.0, 0.9, 0.8, 0.7), (0.8, 0.95, 0.1, 0.1), (1.2, 0.1, 0.1, 0.1), (0.9, 0.5, 0.4, 0.3))
# By hand, with rungs at rounds 1 and 2 of 4. Trial 0 is alone at both. Trial 1 is the best of two at 1, the worse of
# two at 2. Trial 2 is the worst of three at 1, where one goes on. Trial 3 is the second of four at 1, where two go on,
# and the best of three at 2.
ROUNDS = [4, 2, 1, 4]
STATES = ["done", "pruned", "pruned", "done"]


@pytest.fixture(autouse=True)
def contexts() -> Iterator[contextlib.ExitStack]:
    """What a test opens for its length; SQLite does not wait for the disk meanwhile."""

    def hurry(connection: sqlite3.Connection, _: object) -> None:
        connection.execute("PRAGMA synchronous = OFF")

    event.listen(Engine, "connect", hurry)
    with contextlib.ExitStack() as stack:
        yield stack
    event.remove(Engine, "connect", hurry)


def optimise(folder: Path, server: Server, study: Path, audience: Quiet | None = None) -> list[Trial]:
    folder.mkdir(exist_ok=True)
    with connected(folder, server) as connection, open_search(Space.read(study)) as search:
        Optimiser(connection, search, audience or Quiet()).run()
        return search.trials()


def test_halving_ends_the_trials_that_a_hand_computation_ends(tmp_path: Path) -> None:
    study = write_study(tmp_path, HALVING)
    server, audience = Server(CURVES), Quiet()
    trials = optimise(tmp_path / "fed", server, study, audience)
    assert [trial.rounds for trial in trials] == ROUNDS
    assert [trial.state for trial in trials] == STATES
    assert [server.trial(run) for run in sorted(server.cancelled)] == [1, 2]
    assert [trial.curve for trial in trials] == [
        {at + 1: pytest.approx(loss) for at, loss in enumerate(curve[:rounds])}
        for curve, rounds in zip(CURVES, ROUNDS, strict=True)
    ]
    found = best(trials, Space.read(study).study)
    assert found is not None
    assert found.number == 3
    assert trials[1].message == "not among the best after round 2"
    assert audience.told[:6] == ["began 0", *(f"measured 0 {at}" for at in (1, 2, 3, 4)), "done 0"]
    # What a run was submitted with is what the trial drew.
    for run, plan in server.plans.items():
        drawn = trials[server.trial(run)].values
        made = json.loads(plan)
        assert (made["train"]["learning_rate"], made["adapter"]["rank"]) == tuple(drawn.values())


def test_the_greatest_is_best_where_the_study_says_so(tmp_path: Path) -> None:
    study = write_study(tmp_path, HALVING + "objective: {whose: evaluators, direction: maximize}\n")
    # The evaluator of the test's server measures the opposite.
    trials = optimise(tmp_path / "fed", Server(CURVES), study)
    assert [trial.rounds for trial in trials] == ROUNDS
    assert trials[3].objective == pytest.approx(-0.3)
    found = best(trials, Space.read(study).study)
    assert found is not None
    assert found.number == 3


@pytest.mark.slow
def test_a_study_that_is_killed_at_any_write_makes_no_run_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, contexts: contextlib.ExitStack
) -> None:
    class Killed(BaseException):
        pass

    writes = [name for name in vars(RDBStorage) if name.startswith(("set_", "create_new_"))]
    assert len(writes) >= 7
    left = [0]

    def dying(name: str) -> Any:  # noqa: ANN401
        method = getattr(RDBStorage, name)

        def write(*arguments: Any, **named: Any) -> Any:  # noqa: ANN401
            left[0] -= 1
            if left[0] == 0:
                raise Killed
            return method(*arguments, **named)

        return write

    for name in writes:
        monkeypatch.setattr(RDBStorage, name, dying(name))
    server = Server(CURVES)
    connection = contexts.enter_context(connected(tmp_path, server))
    for at in itertools.count(1):
        (tmp_path / str(at)).mkdir()
        study = write_study(tmp_path / str(at), HALVING.replace("trials: 4", "trials: 2"))
        server.forget()
        left[0] = at
        with contextlib.suppress(Killed), open_search(Space.read(study)) as search:
            Optimiser(connection, search, Quiet()).run()
        killed, left[0] = left[0] <= 0, 0
        with open_search(Space.read(study)) as search:
            Optimiser(connection, search, Quiet()).run()
            trials = search.trials()
        assert sorted(map(server.trial, server.plans)) == [0, 1]
        assert trials[0].state == "done"
        assert trials[1].state in ("pruned", "done")
        assert {trial.run_id for trial in trials} == set(server.plans)
        assert server.cancelled == {trial.run_id for trial in trials if trial.state == "pruned"}
        if not killed:
            break
    assert at > 20


def test_a_server_that_was_set_up_anew_gets_the_trial_again(tmp_path: Path) -> None:
    class Stop(BaseException):
        pass

    class Stopping(Quiet):
        def measured(self, trial: Trial, round_: int) -> None:
            raise Stop

    study, server = write_study(tmp_path, "trials: 1\n"), Server(CURVES)
    with pytest.raises(Stop):
        optimise(tmp_path / "fed-1", server, study, Stopping())
    (first,) = server.requests
    server.forget()
    (trial,) = optimise(tmp_path / "fed-2", server, study)
    (second,) = server.requests
    assert first.endswith(".0.0")
    assert second == first[:-1] + "1"
    assert (trial.state, trial.run_id, trial.rounds) == ("done", "1-0", 4)


def test_failures_are_told_and_the_study_goes_on(tmp_path: Path) -> None:
    endings = {0: control.RUN_STATUS_PAUSED, 1: control.RUN_STATUS_CANCELLED}
    curves = (*CURVES[:2], (1.0, 0.5, 0.4), (1.0, 0.5, 0.4, float("inf")), CURVES[3])
    study = write_study(tmp_path, "trials: 5\nmethod: random\nparallel: 2\nfailed_trials: 5\n")
    trials = optimise(tmp_path / "fed", Server(curves, endings), study)
    assert [(trial.state, trial.message) for trial in trials] == [
        ("failed", "paused: said so"),
        ("failed", "cancelled: said so"),
        ("failed", "no loss of the sites after the last round"),
        ("failed", "loss is inf"),
        ("done", ""),
    ]


def test_values_that_the_server_refuses_are_no_end_of_the_study(tmp_path: Path) -> None:
    server = Server(CURVES)
    server.refused.add(0)
    trials = optimise(tmp_path / "fed", server, write_study(tmp_path, "trials: 2\n"))
    assert [(trial.state, trial.run_id) for trial in trials] == [("failed", ""), ("done", "0-0")]
    assert "not installed" in trials[0].message


def test_too_many_failures_in_a_row_end_the_command(tmp_path: Path) -> None:
    study, server = write_study(tmp_path, "trials: 9\n"), Server([()] * 9)
    with pytest.raises(FsllmError, match="3 trials in a row have failed; the last") as caught:
        optimise(tmp_path / "fed-1", server, study)
    assert caught.value.reason == "RUN_FAILED"
    assert len(server.plans) == 3
    with pytest.raises(FsllmError, match="3 trials in a row"):
        optimise(tmp_path / "fed-2", server, study)
    assert len(server.plans) == 6


@pytest.mark.slow
@pytest.mark.parametrize("method", ["random", "tpe"])
def test_a_study_taken_up_again_draws_what_one_that_never_stopped_would(tmp_path: Path, method: str) -> None:
    drawn = []
    for name, stops in (("whole", False), ("parts", True)):
        (tmp_path / name).mkdir()
        space = Space.read(write_study(tmp_path / name, f"method: {method}\nstartup: 3\nseed: 5\n"))
        values: list[Any] = []
        with contextlib.ExitStack() as stack:
            search = stack.enter_context(open_search(space))
            for _ in range(7):
                if stops:
                    stack.close()
                    search = stack.enter_context(open_search(space))
                trial = search.draw()
                search.report(trial.number, 1, float(trial.values["train.learning_rate"]))  # type: ignore[arg-type]
                search.finish(trial.number)
                values.append(trial.values)
        drawn.append(values)
    assert drawn[0] == drawn[1]
    assert len({json.dumps(values) for values in drawn[0]}) == 7
    assert all(
        1e-4 <= values["train.learning_rate"] <= 1e-2 and values["adapter.rank"] in (4, 8) for values in drawn[0]
    )


@pytest.mark.slow
def test_tpe_draws_by_what_was_measured_and_random_does_not(tmp_path: Path) -> None:
    drawn = {}
    for method, sign in itertools.product(("tpe", "random"), (1, -1)):
        folder = tmp_path / f"{method}{sign}"
        folder.mkdir()
        space = Space.read(write_study(folder, f"method: {method}\nstartup: 3\n"))
        with open_search(space) as search:
            for _ in range(5):
                trial = search.draw()
                rate = trial.values["train.learning_rate"]
                assert isinstance(rate, float)
                search.report(trial.number, 1, sign * rate)
                search.finish(trial.number)
            drawn[method, sign] = [trial.values["train.learning_rate"] for trial in search.trials()]
    assert drawn["random", 1] == drawn["random", -1]
    assert drawn["tpe", 1][:3] == drawn["tpe", -1][:3]
    assert not set(drawn["tpe", 1][3:]) & set(drawn["tpe", -1][3:])


def test_request_ids_are_a_trials_own(tmp_path: Path) -> None:
    ids: list[Sequence[str]] = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        space = Space.read(write_study(tmp_path / name))
        for _ in range(2):
            with open_search(space) as search:
                ids.append([search.request_id(Trial(n, "running", {}, attempt=a)) for n in (0, 1) for a in (0, 1)])
    assert ids[0] == ids[1]
    assert ids[2] == ids[3]
    assert len({*ids[0], *ids[2]}) == 8
    assert all(one.startswith("unit.") and len(one) <= 128 for one in ids[0])


def test_a_file_of_another_study_is_refused_and_more_trials_are_not(tmp_path: Path) -> None:
    with open_search(Space.read(write_study(tmp_path))) as search:
        search.draw()
    with open_search(Space.read(write_study(tmp_path, "trials: 50\nparallel: 3\n"))) as search:
        assert len(search.trials()) == 1
    changed = write_study(tmp_path, study=STUDY.replace("[4, 8]", "[4, 16]"))
    with pytest.raises(PlanInvalid, match="space: changed since"), open_search(Space.read(changed)):
        pass
    with pytest.raises(PlanInvalid, match="space: changed since"):
        read_trials(Space.read(changed))
    (tmp_path / "plan.yaml").write_text(write_study(tmp_path).with_name("plan.yaml").read_text().replace("5", "6"))
    with pytest.raises(PlanInvalid, match="plan: changed since"), open_search(Space.read(tmp_path / "study.yaml")):
        pass


def test_a_second_command_and_a_broken_file(tmp_path: Path) -> None:
    space = Space.read(write_study(tmp_path))
    with open_search(space), pytest.raises(FsllmError, match="Another `fsllm tune`") as caught, open_search(space):
        pass
    assert caught.value.reason == "STATE_LOCKED"
    (tmp_path / "study.db").write_bytes(b"no database, " * 1000)
    with pytest.raises(FsllmError, match=r"study\.db: file is not a database") as caught:
        read_trials(space)
    assert caught.value.reason == "STATE_CORRUPT"
    with pytest.raises(FsllmError, match="not a database"), open_search(space):
        pass


def test_what_is_left_beside_the_study(tmp_path: Path) -> None:
    from rich.console import Console

    study = write_study(tmp_path, HALVING)
    trials = optimise(tmp_path / "fed", Server(CURVES), study)
    space = Space.read(study)
    assert read_trials(space) == trials
    assert so_far(space, trials) == [(n, pytest.approx(v)) for n, v in ((0, 0.7), (1, 0.7), (2, 0.7), (3, 0.3))]

    found = write_best(space, trials)
    assert found == trials[3]
    written = tmp_path / "study-best.yaml"
    plan = plan_from_file(written)
    assert plan == space.plan_with("unit-best", trials[3].values)
    assert "cohort" not in written.read_text()
    assert written.read_text().startswith(
        f"# The best of study unit: trial 3, run {trials[3].run_id}, validation loss 0.3"
    )

    write_plot(space, trials)
    picture = (tmp_path / "study.svg").read_bytes()
    write_plot(space, trials)
    assert (tmp_path / "study.svg").read_bytes() == picture
    for words in (b"best so far", b"learning_rate", b"pruned", b"round"):
        assert words in picture

    console = Console(width=200)
    with console.capture() as capture:
        console.print(trials_table(space, trials))
    rows = capture.get().splitlines()
    assert [row.split()[0] for row in rows] == ["trial", "0", "1", "2", "3"]
    assert rows[4].split()[-1] == "best"
    told = study_object(space, trials)
    assert (told["best"], told["best_plan"]) == (3, str(written))
    assert [row["objectives"] for row in told["trials"]][2] == {"1": pytest.approx(1.2)}


def test_where_a_value_lies_on_its_axis(tmp_path: Path) -> None:
    space = Space.read(write_study(tmp_path))
    trial = Trial(0, "done", {"train.learning_rate": 1e-3, "adapter.rank": 8})
    assert height(space, "train.learning_rate", trial) == pytest.approx(0.5)
    assert height(space, "adapter.rank", trial) == 1
