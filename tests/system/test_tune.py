"""A study over a real federation: killed, interrupted, left by its server, and taken up where it stands."""

import json
import os
import signal
import subprocess
import sysconfig
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from tests.system.harness import CALL_SECONDS, ServerProcess
from tests.system.site_process import SiteProcess

from fsllm.v1 import control_pb2 as control
from fsllm_bench.embedded.tasks import write_federation
from fsllm_common.errors import Exit
from fsllm_common.plan import plan_from_file, plan_from_json

pytestmark = pytest.mark.slow

GOOD, BAD = 5e-3, 1e-6
PLAN = f"""
name: base
rounds: 3
model: {{name: embedded}}
adapter: {{rank: 4, alpha: 8}}
cohort: {{quorum: 2, sites: [hospital-a, hospital-b]}}
timing: {{gather_seconds: 60, idle_seconds: 60}}
train: {{steps: 4, batch_size: 8, learning_rate: {BAD}, precision: fp32}}
data: {{template: brief, max_length: 64}}
evaluate: {{metrics: [loss], limit: 20}}
"""
# With this seed the first trial draws the good rate and the other two the bad one.
STUDY = f"""
name: rates
plan: plan.yaml
space:
  train.learning_rate: {{choices: [{GOOD}, {BAD}]}}
method: halving
halving: {{factor: 2, min_rounds: 1}}
trials: 3
seed: 11
"""
WAIT = 240


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server and two sites with the embedded model."""
    folder = tmp_path_factory.mktemp("tune")
    data = write_federation(folder / "data", 0).train
    with ExitStack() as stack:
        server = stack.enter_context(ServerProcess(folder / "server"))
        for name in ("hospital-a", "hospital-b"):
            stack.enter_context(SiteProcess(server, folder / name, data[name], "--metrics-port", "0"))
        yield server


@pytest.fixture
def study(tmp_path: Path) -> Path:
    (tmp_path / "plan.yaml").write_text(PLAN)
    (tmp_path / "study.yaml").write_text(STUDY)
    return tmp_path / "study.yaml"


class Tune:
    """``fsllm tune STUDY --json``, line by line."""

    def __init__(self, server: ServerProcess, study: Path) -> None:
        self._process = subprocess.Popen(
            [f"{sysconfig.get_path('scripts')}/fsllm", "tune", str(study), "--json"],
            env=os.environ | {"FSLLM_STATE_DIR": str(server.state)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.told: list[dict[str, Any]] = []

    def until(self, **wanted: object) -> dict[str, Any]:
        """Read lines up to the first that has these fields."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.told.append(json.loads(line))
            if wanted.items() <= self.told[-1].items():
                return self.told[-1]
        raise AssertionError(f"no line with {wanted}: {self.told}\n{self._process.communicate()[1]}")

    def end(self, number: signal.Signals | None = None) -> tuple[int, str]:
        """Send a signal, read the rest, and return the exit code and standard error."""
        if number is not None:
            self._process.send_signal(number)
        out, err = self._process.communicate(timeout=WAIT)
        self.told += map(json.loads, out.splitlines())
        return self._process.returncode, err


def runs(server: ServerProcess) -> dict[str, control.Run]:
    """Return the runs that the server knows, by name; a name that came twice fails."""
    found = server.control().ListRuns(control.ListRunsRequest(), timeout=CALL_SECONDS).runs
    assert len({run.name for run in found}) == len(found)
    return {run.name: run for run in found}


def test_a_study_survives_its_commands_and_its_server(federation: ServerProcess, study: Path) -> None:
    killed = Tune(federation, study)
    begun = killed.until(kind="trial", trial=0, state="running")
    killed.until(kind="round", trial=0, round=1)
    killed.end(signal.SIGKILL)

    interrupted = Tune(federation, study)
    assert interrupted.until(kind="trial", trial=0, state="running")["run_id"] == begun["run_id"]
    done = interrupted.until(kind="trial", trial=0, state="done")
    assert done["rounds"] == 3
    second = interrupted.until(kind="trial", trial=1, state="running")
    code, err = interrupted.end(signal.SIGINT)
    assert code == 130
    assert "takes the study up where it stands" in err
    assert "Traceback" not in err

    last = Tune(federation, study)
    assert last.until(kind="trial", trial=1)["run_id"] == second["run_id"]
    federation.kill()
    federation.restart()
    assert last.end()[0] == 0
    conclusion = last.told[-1]
    assert conclusion["kind"] == "study"
    assert conclusion["best"] == 0
    trials = conclusion["trials"]
    assert [trial["values"]["train.learning_rate"] for trial in trials] == [GOOD, BAD, BAD]
    # The second trial's run may have come to its end while no command watched: then it is done.
    assert [trial["state"] for trial in trials] in (["done", "pruned", "pruned"], ["done", "done", "pruned"])
    rounds = [trial["rounds"] for trial in trials]
    # Or it has gone a round further than where it would have been pruned.
    assert rounds[::2] == [3, 1]
    assert rounds[1] in ([3] if trials[1]["state"] == "done" else [1, 2])

    # No run is made twice, each has its trial's values, and the pruned ones do not go on.
    known = runs(federation)
    assert {name: run.run_id for name, run in known.items()} == {
        f"rates-{trial['trial']}": trial["run_id"] for trial in trials
    }
    for trial in trials:
        run = federation.control().GetRun(control.GetRunRequest(run_id=trial["run_id"]), timeout=CALL_SECONDS).run
        assert plan_from_json(run.plan).train.learning_rate == trial["values"]["train.learning_rate"]
        whole = len(run.commits) == 4  # so fast that the cancellation came too late
        wanted = control.RUN_STATUS_DONE if trial["state"] == "done" or whole else control.RUN_STATUS_CANCELLED
        assert run.status == wanted
        # The objective is the sites' mean, each weighted by the rows it measured. No version goes unmeasured though the
        # server was killed: the sites have the plan's gather_seconds to come back. A run that was cancelled may have a
        # last version that nobody has measured.
        told = {int(number) for number in trial["objectives"]}
        assert told == set(range(1, trial["rounds"] + 1)) <= {commit.round for commit in run.commits}
        for commit in run.commits:
            if commit.round in told:
                measured = [m for member in commit.metrics for m in member.metrics if m.name == "loss"]
                mean = sum(m.value * m.weight for m in measured) / sum(m.weight for m in measured)
                assert trial["objectives"][str(commit.round)] == pytest.approx(mean)

    best = plan_from_file(study.with_name("study-best.yaml"))
    assert (best.name, best.train.learning_rate, best.train.steps) == ("rates-best", GOOD, 4)
    assert study.with_suffix(".svg").read_text().startswith("<?xml")

    # A study at its end says so, and does nothing.
    again = Tune(federation, study)
    assert again.end()[0] == 0
    assert again.told == [conclusion]
    assert len(runs(federation)) == len(known)


def test_failures_are_told_and_a_study_of_nothing_else_ends(federation: ServerProcess, study: Path) -> None:
    """A run that is cancelled elsewhere, and runs that need a model that no site has."""
    study.write_text(
        STUDY.replace("rates", "lost").replace("method: halving", "failed_trials: 2").replace("halving:", "#")
    )
    (study.parent / "plan.yaml").write_text(PLAN.replace("name: embedded", "name: nowhere"))
    tune = Tune(federation, study)
    for at in range(2):
        run = tune.until(kind="trial", trial=at, state="running")["run_id"]
        federation.control().CancelRun(control.CancelRunRequest(run_id=run), timeout=CALL_SECONDS)
        failed = tune.until(kind="trial", trial=at)
        assert (failed["state"], failed["message"].startswith("cancelled")) == ("failed", True)
    code, err = tune.end()
    assert code == Exit.RUN_FAILED
    assert f"2 trials in a row have failed; the last (run {run}): cancelled" in err
    assert "Traceback" not in err


def test_one_command_at_a_time(federation: ServerProcess, study: Path) -> None:
    study.write_text(STUDY.replace("rates", "alone"))
    (study.parent / "plan.yaml").write_text(PLAN.replace("[hospital-a, hospital-b]", "[hospital-c, hospital-d]"))
    first = Tune(federation, study)
    run = first.until(kind="trial", state="running")["run_id"]
    code, err = Tune(federation, study).end()
    assert (code, "[STATE_LOCKED]" in err) == (Exit.STORAGE, True)
    first.end(signal.SIGINT)
    federation.control().CancelRun(control.CancelRunRequest(run_id=run), timeout=CALL_SECONDS)

    study.write_text(STUDY.replace("rates", "alone").replace(str(GOOD), "0.007"))
    code, err = Tune(federation, study).end()
    assert (code, "space: changed since" in err) == (Exit.CONFIGURATION, True)
