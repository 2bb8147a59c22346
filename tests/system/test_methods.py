"""Every method, federated for real: daemons train the embedded model, its loss falls, each round is recomputed.

Of all but those that ``ELSEWHERE`` names, with the reason.
"""

import json
import os
import subprocess
import sysconfig
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from tests.system.harness import CALL_SECONDS, ServerProcess
from tests.system.plain_peft import measure, validation
from tests.system.runs import await_done, submit, until
from tests.system.site_process import SiteProcess

from fsllm.v1.control_pb2 import CancelRunRequest, GetRunRequest, Run
from fsllm_bench.embedded.tasks import write_federation
from fsllm_common.algorithms import algorithm_class, algorithm_names
from fsllm_common.plan import Plan

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

SITES = ("hospital-a", "hospital-b")
THIRD = "hospital-c"
"""Takes part where a method needs more than two."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """Return a server with three sites, of which the second has no room for a rank above 4."""
    folder = tmp_path_factory.mktemp("methods")
    files = write_federation(folder / "data", 0)
    with ExitStack() as stack:
        server = stack.enter_context(ServerProcess(folder / "server"))
        for name in (*SITES, THIRD):
            rows = folder / f"{name}.jsonl"
            rows.write_text("".join(files.train[name].read_text().splitlines(keepends=True)[:80]))
            policy = folder / f"{name}.toml"
            policy.write_text("[accept]\nmaximum_rank = 4\n" if name == SITES[1] else "")
            stack.enter_context(SiteProcess(server, folder / name, rows, "--policy", str(policy)))
        rows = folder / "judge.jsonl"
        rows.write_text("".join(files.heldout.read_text().splitlines(keepends=True)[:60]))
        stack.enter_context(SiteProcess(server, folder / "judge", rows, role="evaluator"))
        yield server


def make_plan(name: str, **sections: dict[str, Any]) -> dict[str, Any]:
    plan: dict[str, Any] = {
        "name": name,
        "seed": 3,
        "rounds": 2,
        "model": {"name": "embedded"},
        "adapter": {"rank": 4, "alpha": 8},
        "algorithm": {"name": name},
        "cohort": {"sites": list(SITES)},
        "timing": {"gather_seconds": 0.1},
        "train": {"steps": 4, "batch_size": 8, "learning_rate": 0.01, "precision": "fp32"},
        "data": {"template": "brief", "max_length": 96},
        "wire": {"element_type": "fp32"},
        "evaluate": {"metrics": ["loss"], "limit": 8},
    }
    return plan | {key: {**plan[key], **value} for key, value in sections.items()}


def losses(run: Run, members: int = len(SITES), role: str = "site") -> list[float]:
    """Return the mean loss of the members of a role after each round, from version 0 on."""
    found = []
    for commit in run.commits:
        measured = [member for member in commit.metrics if member.role == role]
        metrics = [metric for member in measured for metric in member.metrics if metric.name == "loss"]
        assert len(metrics) == members
        found.append(sum(m.value * m.weight for m in metrics) / sum(m.weight for m in metrics))
    return found


def verify(server: ServerProcess, run: str) -> list[dict[str, Any]]:
    done = subprocess.run(
        [f"{sysconfig.get_path('scripts')}/fsllm", "run", "verify", run, "--json"],
        env=os.environ | {"FSLLM_STATE_DIR": str(server.state)},
        capture_output=True,
        text=True,
        check=True,
    )
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


TWO_RANKS: dict[str, Any] = {"rank": 8, "alpha": 8, "ranks": [4]}

PLAIN_SGD = {"optimizer": "sgd", "learning_rate": 0.4, "max_grad_norm": 0}
ZEROTH = {"optimizer": "sgd", "learning_rate": 0.002, "max_grad_norm": 0, "steps": 16}
FROZEN = {"parameters": {"freeze_a": True}}
# These need three updates where none of them is bad. What they do about bad ones: unit/test_algorithms_robust_runs.py.
THREE = {"sites": [*SITES, THIRD], "quorum": 3}

METHODS: dict[str, dict[str, dict[str, Any]]] = {
    "fedavg": {},
    "fedavgm": {},
    "fedadam": {},
    "fedyogi": {},
    "fedadagrad": {},
    "fedprox": {},
    "scaffold": {"algorithm": {"parameters": {"sites": 2}}},
    "scaffold-async": {
        "algorithm": {"name": "scaffold"},
        "cohort": {"buffer": {"size": 2, "weight": "constant"}},
    },
    "fednova": {"train": PLAIN_SGD},
    "median": {"algorithm": FROZEN, "cohort": THREE},
    "trimmed-mean": {"algorithm": {"parameters": {"freeze_a": True, "trim": 0.4}}, "cohort": THREE},
    "krum": {"algorithm": {"parameters": {"byzantine": 0}}, "cohort": THREE},
    "multi-krum": {"algorithm": {"parameters": {"byzantine": 0, "selected": 2}}, "cohort": THREE},
    "bulyan": {"algorithm": {"parameters": {"freeze_a": True, "byzantine": 0}}, "cohort": THREE},
    "norm-bound": {},
    "geometric-median": {"cohort": THREE},
    "centred-clipping": {"cohort": THREE},
    "fltrust": {},
    "ditto": {},
    "pfedme": {
        "train": {**PLAIN_SGD, "learning_rate": 0.8},
        "algorithm": {"parameters": {"pull": 1.0, "inner_learning_rate": 0.5}},
    },
    "fedper": {},
    "fedrep": {},
    "apfl": {"train": {**PLAIN_SGD, "learning_rate": 0.2}},
    "fedalt": {},
    "fdlora": {},
    "fedmezo": {"train": ZEROTH},
    "fedkseed": {"train": ZEROTH},
    "fedkseed-pro": {
        "train": ZEROTH,
        "algorithm": {"name": "fedkseed", "parameters": {"draw": "amplitude", "seeds": 64}},
    },
    "ferret": {"algorithm": {"parameters": {"coordinates": 8192}, "server_learning_rate": 0.2}},
    "fedit": {},
    "ffa-lora": {},
    "ffa-lora-ranks": {"algorithm": {"name": "ffa-lora"}, "adapter": TWO_RANKS},
    "fedsa-lora": {"adapter": TWO_RANKS},
    "rolora": {},
    "flora": {"adapter": TWO_RANKS},
    "flexlora": {"adapter": TWO_RANKS},
    "hetlora": {"adapter": TWO_RANKS},
    "hetlora-pruned": {
        "adapter": TWO_RANKS,
        "algorithm": {"name": "hetlora", "parameters": {"prune_penalty": 0.05, "keep": 0.8}},
    },
    "fedex": {"algorithm": {"parameters": {"learning_rates": "0.5,1"}}},
    "fedex-lora": {"adapter": TWO_RANKS},
    "lora-fair": {},
    "rac-lora": {"adapter": TWO_RANKS},
    "fedask": {"adapter": TWO_RANKS},
    "fed-sb": {"adapter": {"kind": "lora-xs", "rank": 4}, "train": {"learning_rate": 0.05}},
    "fed-sb-ranks": {
        "algorithm": {"name": "fed-sb"},
        "adapter": {"kind": "lora-xs", **TWO_RANKS},
        "train": {"learning_rate": 0.05},
    },
}

ELSEWHERE = {"dpo": "test_preferences.py", "hlora": "flexlora by another name", "noop": "trains nothing"}


def test_every_installed_method_is_here() -> None:
    here = {sections.get("algorithm", {}).get("name", name) for name, sections in METHODS.items()}
    assert here | ELSEWHERE.keys() == {*algorithm_names()}
    assert here.isdisjoint(ELSEWHERE)
    assert algorithm_class("hlora").__bases__ == (algorithm_class("flexlora"),)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_lowers_the_loss_and_every_round_is_recomputed(name: str, server: ServerProcess) -> None:
    plan = Plan.model_validate(made := make_plan(name, **METHODS[name]))
    run = await_done(server, submit(server, made))
    trusted = ["judge"] if name == "fltrust" else []
    assert plan.cohort.sites is not None
    wanted = [[], *[[*plan.cohort.sites, *trusted]] * 2]
    assert [sorted(c.member for c in commit.contributions) for commit in run.commits][1:] == wanted[1:]
    found = losses(run, len(plan.cohort.sites))
    least = 0.95 if METHODS[name].get("train") == ZEROTH else 0.75
    assert found[-1] < least * found[0], found
    assert [line["verdict"] for line in verify(server, run.run_id)] == ["recomputed"] * 3
    # Who measures a held-out file has something to measure only where there is one model.
    (judge,) = [member for member in run.members if member.name == "judge"]
    personalised = algorithm_class(plan.algorithm.name)(plan).personalised
    assert (judge.standing == "declined") is personalised
    if not personalised:
        held_out = losses(run, 1, "evaluator")
        assert held_out[-1] < least * held_out[0], held_out


@pytest.mark.parametrize("name", ["ditto", "fedsa-lora", "fedalt"])
def test_a_sites_own_adapter_is_exported_by_itself(name: str, server: ServerProcess, tmp_path: Path) -> None:
    plan = make_plan(name, **METHODS[name])
    run = await_done(server, submit(server, plan))
    for site in SITES:
        state = server.state.with_name(site)
        done = subprocess.run(
            [f"{sysconfig.get_path('scripts')}/fsllm-client", "export", run.run_id, str(tmp_path / site), "--json"],
            env=os.environ | {"FSLLM_STATE_DIR": str(state)},
            capture_output=True,
            check=True,
        )
        told = json.loads(done.stdout)
        assert (told["version"], told["round"]) == (2, 2)
        (own,) = [member for member in run.commits[-1].metrics if member.member == site]
        (loss,) = [metric.value for metric in own.metrics if metric.name == "loss"]
        assert measure(tmp_path / site, validation(state.with_name(f"{site}.jsonl"), plan)) == pytest.approx(
            loss, rel=1e-4
        )


def test_a_site_that_joins_late_has_all_that_the_base_has_gained(server: ServerProcess, tmp_path: Path) -> None:
    """Of a ledger that was compressed before it came."""
    algorithm = {"parameters": {"ledger_rank": 10}}
    plan = make_plan("flora", algorithm=algorithm, cohort={"sites": None, "quorum": 2}) | {"name": "late", "rounds": 99}
    run = submit(server, plan)
    until(server, run, "commit", "2")
    rows = tmp_path / "late.jsonl"
    rows.write_text((server.state.with_name(f"{SITES[0]}.jsonl")).read_text())
    with SiteProcess(server, tmp_path / "latecomer", rows):
        counted = until(server, run, "update", "latecomer").round
        until(server, run, "commit", str(counted))
        server.control().CancelRun(CancelRunRequest(run_id=run), timeout=CALL_SECONDS)
        commit = server.control().GetRun(GetRunRequest(run_id=run), timeout=CALL_SECONDS).run.commits[counted]
    losses = {member.member: m.value for member in commit.metrics for m in member.metrics if m.name == "loss"}
    # The same rows, and the same model: it measures what a site measures that was there from the beginning.
    assert losses["latecomer"] == pytest.approx(losses[SITES[0]], rel=1e-4)
    assert losses["latecomer"] < 9
    assert verify(server, run)[counted]["verdict"] == "recomputed"


def test_a_ledger_is_exported_as_one_adapter(server: ServerProcess, tmp_path: Path) -> None:
    plan = make_plan("flora")
    run = await_done(server, submit(server, plan | {"name": "flora-export"}))
    subprocess.run(
        [f"{sysconfig.get_path('scripts')}/fsllm", "run", "export", run.run_id, "-o", str(tmp_path / "adapter")],
        env=os.environ | {"FSLLM_STATE_DIR": str(server.state)},
        capture_output=True,
        check=True,
    )
    examples = [one for site in SITES for one in validation(server.state.with_name(f"{site}.jsonl"), plan)]
    assert measure(tmp_path / "adapter", examples) == pytest.approx(losses(run)[-1], rel=1e-4)
