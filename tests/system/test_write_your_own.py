"""A method of another package, as docs/write-your-own.md has it: installed, found by real daemons, run and verified."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml
from tests.system.harness import ServerProcess, meaning_of
from tests.system.runs import await_done, submit
from tests.system.site_process import SiteProcess
from tests.system.test_methods import losses, verify

from fsllm.v1 import control_pb2 as control
from fsllm_bench.embedded.tasks import write_federation

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

PACKAGE = Path(__file__).parents[2] / "docs" / "examples" / "fsllm-lion"
WILLING = ("hospital-a", "hospital-b")
STRICT, WITHOUT = "hospital-c", "hospital-d"


@dataclass(frozen=True)
class Federation:
    """A server and two sites that have the package, one whose policy does not name it, and one that lacks it."""

    server: ServerProcess
    sites: dict[str, SiteProcess]
    installed: dict[str, str]
    """The environment in which the package is there."""


def command(*words: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    program = [f"{sysconfig.get_path('scripts')}/fsllm", *words]
    return subprocess.run(program, env=os.environ | environment, capture_output=True, text=True, check=False)


def make_plan(name: str) -> dict[str, Any]:
    plan: dict[str, Any] = yaml.safe_load((PACKAGE / "plan.yaml").read_text())
    return plan | {"name": name, "wire": {"element_type": "fp32"}, "timing": {"gather_seconds": 0.1}}


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Install the package into a folder, as pip does it, and return the variable that adds this folder to Python's."""
    folder = tmp_path_factory.mktemp("package")
    shutil.copytree(PACKAGE, folder / "source", ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index"]
    options = ["--no-deps", "--no-build-isolation", "--target", str(folder / "installed"), str(folder / "source")]
    subprocess.run([*pip, *options], check=True)
    return {"PYTHONPATH": str(folder / "installed")}


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory, installed: dict[str, str]) -> Iterator[Federation]:
    folder = tmp_path_factory.mktemp("federation")
    files = write_federation(folder / "data", 0)
    rows = folder / "rows.jsonl"
    rows.write_text("".join(files.train[WILLING[0]].read_text().splitlines(keepends=True)[:80]))
    (folder / "default.toml").write_text("[accept]\n# Only what is named may run.\nalgorithms = ['built-in']\n")
    with ExitStack() as stack:
        server = stack.enter_context(ServerProcess(folder / "server", environment=installed))
        sites = {}
        for name in (*WILLING, STRICT, WITHOUT):
            policy = folder / "default.toml" if name == STRICT else PACKAGE / "policy.toml"
            site = SiteProcess(server, folder / name, rows, "--policy", str(policy))
            site.environment.update({} if name == WITHOUT else installed)
            sites[name] = stack.enter_context(site)
            site.await_log("attached")
        yield Federation(server, sites, installed)


def test_the_packages_own_tests_pass(installed: dict[str, str]) -> None:
    tests = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(PACKAGE)]
    done = subprocess.run(tests, env=os.environ | installed, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_the_operator_needs_the_package_to_check_a_plan(installed: dict[str, str], tmp_path: Path) -> None:
    plan = str(PACKAGE / "plan.yaml")
    assert command("plan", "check", plan, environment=installed).returncode == 0
    without = command("plan", "check", plan, environment={})
    assert without.returncode != 0
    assert "unknown algorithm 'fedlion'" in " ".join((without.stdout + without.stderr).split())


def test_the_packages_own_refusal_refuses_a_plan(installed: dict[str, str], tmp_path: Path) -> None:
    plan = tmp_path / "plan.yaml"
    plan.write_text(yaml.safe_dump(make_plan("lion-async") | {"cohort": {"quorum": 2, "buffer": {"size": 2}}}))
    refused = command("plan", "check", str(plan), environment=installed)
    assert refused.returncode != 0
    assert "leave cohort.buffer out" in " ".join((refused.stdout + refused.stderr).split())


def test_a_server_without_the_package_refuses_the_plan(tmp_path: Path) -> None:
    with ServerProcess(tmp_path / "server") as server, pytest.raises(grpc.RpcError) as refused:
        submit(server, make_plan("lion"))
    meaning = meaning_of(refused.value)
    assert meaning.reason == "PLAN_INVALID"
    assert "unknown algorithm 'fedlion'" in meaning.message


def test_it_trains_is_recomputed_and_goes_on_without_those_that_do_not_take_part(federation: Federation) -> None:
    run = await_done(federation.server, submit(federation.server, make_plan("lion")))
    for commit in run.commits[1:]:
        assert sorted(contribution.member for contribution in commit.contributions) == list(WILLING)
    found = losses(run)
    assert found[-1] < found[0] - 1e-3, found
    # The uploads of the last three rounds are kept.
    assert [line["verdict"] for line in verify(federation.server, run.run_id)[1:]] == ["recomputed"] * 3

    said = {member.name: (member.standing, member.message) for member in run.members}
    assert said[STRICT][0] == "declined"
    assert (
        "default.toml line 3: accept.algorithms = [built-in]; the plan has algorithm.name = fedlion" in said[STRICT][1]
    )
    assert said[WITHOUT][0] == "declined"
    assert "unknown algorithm 'fedlion'" in said[WITHOUT][1]

    listed = federation.server.control().ListManifests(control.ListManifestsRequest(run_id=run.run_id))
    manifests = [json.loads(one.manifest.body) for one in listed]
    assert {manifest["reducer"]["package"] for manifest in manifests} == {"fsllm-lion 0.1.0"}


def test_another_version_of_the_package_is_named_where_it_gives_other_bits(federation: Federation) -> None:
    server, (folder,) = federation.server, map(Path, federation.installed.values())
    (listed,) = server.control().ListRuns(control.ListRunsRequest()).runs
    other = folder.with_name("another")
    shutil.copytree(folder, other)
    code, (metadata,) = other / "fsllm_lion.py", other.glob("*.dist-info/METADATA")
    code.write_text(code.read_text().replace("momentum *= beta2", "momentum *= beta1"))
    metadata.write_text(metadata.read_text().replace("Version: 0.1.0", "Version: 0.2.0"))
    server.stop()
    server.environment = {"PYTHONPATH": str(other)}
    server.restart()
    show = command("run", "verify", listed.run_id, environment={"FSLLM_STATE_DIR": str(server.state)})
    assert show.returncode == 9
    words = " ".join(show.stdout.split())
    assert "the round was made with fsllm-lion 0.1.0; installed is fsllm-lion 0.2.0" in words
