"""A server for studies that a test makes up: each run's objectives are what a table says of its trial's number."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

import grpc

from fsllm.v1 import control_pb2 as control
from fsllm.v1.control_pb2_grpc import ControlServiceServicer
from fsllm.v1.federation_pb2 import Metric
from fsllm_common.errors import REASONS, FsllmError
from fsllm_common.rpc_errors import status_from
from fsllm_operator.tune.search import Trial
from fsllm_operator.watching import Watched

PLAN = """
name: base
rounds: 4
model: {name: embedded}
train: {steps: 5, learning_rate: 1.0e-3}
"""
STUDY = """
name: unit
plan: plan.yaml
space:
  train.learning_rate: {low: 1.0e-4, high: 1.0e-2, log: true}
  adapter.rank: {choices: [4, 8]}
"""


def write_study(folder: Path, more: str = "", *, study: str = STUDY, plan: str = PLAN) -> Path:
    (folder / "plan.yaml").write_text(plan)
    (folder / "study.yaml").write_text(study + more)
    return folder / "study.yaml"


class Quiet:
    """An audience that remembers what it was told."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def began(self, trial: Trial, watched: Watched) -> None:
        self.told.append(f"began {trial.number}")

    def happened(self, trial: int, event: control.WatchRunResponse) -> None:
        pass

    def measured(self, trial: Trial, round_: int) -> None:
        self.told.append(f"measured {trial.number} {round_}")

    def ended(self, trial: Trial) -> None:
        self.told.append(f"{trial.state} {trial.number}")

    def lost(self, error: FsllmError) -> None:
        self.told.append(f"lost {error.reason}")


class Server(ControlServiceServicer):
    """Commits all rounds of a run at once when it is watched; ``curves[trial]`` are its objectives from round 1 on."""

    def __init__(self, curves: Sequence[Sequence[float]], endings: Mapping[int, int] | None = None) -> None:
        self.curves = curves
        self.endings = endings or {}
        """Trial -> the status in which its run ends, where that is not done."""
        self.requests: dict[str, str] = {}
        """request_id -> run_id"""
        self.plans: dict[str, bytes] = {}
        self.cancelled: set[str] = set()
        self.watched: set[str] = set()
        self.refused: set[int] = set()
        """Trials whose plans it does not take."""
        self.generation = 0

    def forget(self) -> None:
        """Be set up anew."""
        self.requests, self.plans, self.generation = {}, {}, self.generation + 1
        self.cancelled, self.watched = set(), set()

    def GetServer(  # noqa: N802
        self, request: control.GetServerRequest, context: grpc.ServicerContext
    ) -> control.GetServerResponse:
        return control.GetServerResponse(federation="fed")

    def SubmitRun(  # noqa: N802
        self, request: control.SubmitRunRequest, context: grpc.ServicerContext
    ) -> control.SubmitRunResponse:
        if int(json.loads(request.plan)["name"].rpartition("-")[2]) in self.refused:
            refuse(context, FsllmError("PLAN_INVALID", "the algorithm is not installed here"))
        run = self.requests.setdefault(request.request_id, f"{self.generation}-{len(self.requests)}")
        assert self.plans.setdefault(run, request.plan) == request.plan
        return control.SubmitRunResponse(run=self.run(run))

    def GetRun(self, request: control.GetRunRequest, context: grpc.ServicerContext) -> control.GetRunResponse:  # noqa: N802
        if request.run_id not in self.plans:
            refuse(context, FsllmError("RUN_UNKNOWN", f"no run {request.run_id}"))
        return control.GetRunResponse(run=self.run(request.run_id))

    def WatchRun(  # noqa: N802
        self, request: control.WatchRunRequest, context: grpc.ServicerContext
    ) -> Iterator[control.WatchRunResponse]:
        self.watched.add(request.run_id)
        run = self.run(request.run_id)
        for commit in run.commits:
            yield control.WatchRunResponse(sequence=commit.round + 1, kind="commit", round=commit.round, commit=commit)
        if run.status == control.RUN_STATUS_PAUSED:
            yield control.WatchRunResponse(sequence=99, kind="status", subject="paused", message="too many failures")

    def CancelRun(self, request: control.CancelRunRequest, context: grpc.ServicerContext) -> control.CancelRunResponse:  # noqa: N802
        self.cancelled.add(request.run_id)
        return control.CancelRunResponse(run=self.run(request.run_id))

    def trial(self, run_id: str) -> int:
        return int(json.loads(self.plans[run_id])["name"].rpartition("-")[2])

    def run(self, run_id: str) -> control.Run:
        trial = self.trial(run_id)
        ended = run_id in self.watched
        status = self.endings.get(trial, control.RUN_STATUS_DONE) if ended else control.RUN_STATUS_RUNNING
        name = json.loads(self.plans[run_id])["name"]
        run = control.Run(run_id=run_id, name=name, status=status, rounds=4, message="said so" if ended else "")
        if ended:
            run.commits.extend(commit(at, loss) for at, loss in enumerate((9.0, *self.curves[trial])))
        return run


def refuse(context: grpc.ServicerContext, error: FsllmError) -> NoReturn:
    status = status_from(error)
    context.set_trailing_metadata((("grpc-status-details-bin", status.SerializeToString()),))
    context.abort(grpc.StatusCode[REASONS[error.reason].status], status.message)


def commit(round_: int, loss: float) -> control.Commit:
    """Return a round of two sites, with a mean of ``loss`` when weighted by 1 and 3, and of an evaluator."""

    def measured(member: str, role: str, value: float, weight: float) -> control.MemberMetrics:
        return control.MemberMetrics(
            member=member, role=role, metrics=[Metric(name="loss", value=value, weight=weight)]
        )

    return control.Commit(
        round=round_,
        metrics=[
            measured("a", "site", loss + 0.3, 1),
            measured("b", "site", loss - 0.1, 3),
            measured("e", "evaluator", -loss, 5),
        ],
    )
