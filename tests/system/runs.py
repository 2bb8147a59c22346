"""Runs of the noop algorithm for system tests: submitted, watched to the end, and compared with their closed form."""

import json
from collections.abc import Iterator
from uuid import uuid4

import numpy as np
import numpy.typing as npt
from tests.system.harness import CALL_SECONDS, ServerProcess
from tests.system.peer import read_payload
from tests.system.site_process import SiteProcess

from fsllm.v1 import control_pb2 as control
from fsllm_client.site.synthetic import delta_value

RUN_SECONDS = 120.0


def noop_plan(*names: str, **keys: object) -> dict[str, object]:
    """Return the plan of a run of these sites that trains nothing: one round, unless ``keys`` say otherwise."""
    return {
        "name": f"run-{uuid4().hex[:8]}",
        "rounds": 1,
        "model": {"name": "synthetic"},
        "algorithm": {"name": "noop"},
        "cohort": {"quorum": len(names), "sites": sorted(names)},
        "timing": {"gather_seconds": 0.01},
        "wire": {"element_type": "fp32"},
        "evaluate": {"every": 0},
        **keys,
    }


def plan_for(*sites: SiteProcess, **keys: object) -> dict[str, object]:
    algorithm = {"name": "noop", "weighting": "uniform", "synthetic": {"tensors": 5, "mebibytes": 2.5}}
    return noop_plan(*(site.name for site in sites), **{"seed": 11, "rounds": 3, "algorithm": algorithm, **keys})


def submit(server: ServerProcess, plan: dict[str, object]) -> str:
    request = control.SubmitRunRequest(plan=json.dumps(plan).encode(), request_id=uuid4().hex)
    return server.control().SubmitRun(request, timeout=CALL_SECONDS).run.run_id


def events(server: ServerProcess, run: str) -> Iterator[control.WatchRunResponse]:
    return iter(server.control().WatchRun(control.WatchRunRequest(run_id=run), timeout=RUN_SECONDS))


def until(server: ServerProcess, run: str, kind: str, subject: str | None = None) -> control.WatchRunResponse:
    return next(e for e in events(server, run) if e.kind == kind and subject in (None, e.subject))


def await_done(server: ServerProcess, run: str) -> control.Run:
    for _ in events(server, run):
        pass
    found = server.control().GetRun(control.GetRunRequest(run_id=run), timeout=CALL_SECONDS).run
    assert found.status == control.RUN_STATUS_DONE, found
    return found


def final(server: ServerProcess, run: str) -> npt.NDArray[np.float32]:
    with server.channel(server.operator()) as channel:
        export = channel.unary_stream(
            "/fsllm.v1.ControlService/ExportRun",
            request_serializer=control.ExportRunRequest.SerializeToString,
            response_deserializer=None,
        )
        _, payload = read_payload(export(control.ExportRunRequest(run_id=run), timeout=CALL_SECONDS))
    return np.frombuffer(payload, "<f4")


def expected(
    sites: tuple[SiteProcess, ...], rounds: int, seed: int = 11, mebibytes: float = 2.5
) -> npt.NDArray[np.float32]:
    """Return version 0, drawn tensor by tensor, plus the mean of the sites' constants of every round."""
    generator = np.random.Generator(np.random.PCG64(seed))
    elements = round(mebibytes * 2**18)
    sizes = [elements // 5 + (1 if at < elements % 5 else 0) for at in range(5)]
    zero = np.concatenate([generator.standard_normal(size, dtype=np.float32) * np.float32(0.02) for size in sizes])
    total = sum(delta_value(site.name, round_) for site in sites for round_ in range(1, rounds + 1)) / len(sites)
    return zero + np.float32(total)
