"""The command: what it says of a mistake, its exit codes, and the small subcommands."""

import json
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import structlog
from click.testing import CliRunner, Result
from safetensors.numpy import load_file, save_file

from fsllm_client.cli import main
from fsllm_client.site import own_adapter
from fsllm_client.site.ledger import Ledger, Release
from fsllm_client.site.runs import RunBook
from fsllm_client.site.state import StateFolder
from fsllm_common.algorithms.fedalt import RestOfWorld
from fsllm_common.algorithms.local_rule import LocalRule
from fsllm_common.plan import Plan, plan_from_json


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    for name in [name for name in os.environ if name.startswith("FSLLM_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("FSLLM_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("GRPC_VERBOSITY", "NONE")
    mask = os.umask(0o077)
    yield
    # What a daemon sets for its process must not stay in the tests'.
    os.umask(mask)
    structlog.reset_defaults()


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments))


@pytest.mark.parametrize(
    ("arguments", "told", "code"),
    [
        ((), "--server is required", 3),
        (("--server", "host"), "--server: a server is written host:port", 3),
        (("--server", "h:1", "--data", "/nowhere"), "--data: /nowhere does not exist", 3),
        (("--server", "h:1", "--data", "/", "--ranks", "0"), "--ranks", 3),
        (("--server", "h:1", "--data", "/"), "NOT_ENROLLED", 6),
        (("--server", "h:1", "--data", "/", "--join", "/nowhere"), "JOIN_FILE_INVALID", 6),
        (("accept", "r"), "is not the state folder of a site", 3),
        (("ledger",), "is not the state folder of a site", 3),
        (("explain", "plan.txt"), "ends in .yaml", 3),
        (("explain", "plan.yaml", "--policy", "/nowhere.toml"), "The policy /nowhere.toml can not be read: No such", 3),
        (("model", "digest", "/nowhere"), "MODEL_MISSING", 5),
        (("--serve", "h:1"), "No such option", 2),
        (("acept", "r"), "No such command 'acept'", 2),
    ],
)
def test_a_mistake_is_told_in_words_with_its_exit_code(arguments: tuple[str, ...], told: str, code: int) -> None:
    done = run(*arguments)
    assert told in done.output
    assert "Traceback" not in done.output
    assert done.exit_code == code


def test_the_doctor_leaves_the_names_of_fields_to_the_plan(tmp_path: Path) -> None:
    rows = tmp_path / "rows.csv"
    rows.write_text("question,reply\nprivate,words\n")
    done = run("doctor", "--json", "--data", str(rows))
    (check,) = [check for check in json.loads(done.output) if check["name"] == "data"]
    assert check["outcome"] == "warning"
    assert "instruction and output" in check["message"]
    assert "fields: {instruction: question" in check["cure"]
    assert "private" not in done.output


def test_help_shows_the_daemons_settings_and_the_commands() -> None:
    told = run("--help").output
    for part in ("--server", "FSLLM_JOIN", "explain", "doctor", "ledger", "accept", "Exit codes"):
        assert part in told


def test_an_error_in_the_policy_ends_the_daemon_before_it_connects(tmp_path: Path) -> None:
    state = StateFolder(tmp_path / "state")
    state.policy.write_text("[accept]\nmaximum_round = 3")
    done = run("--server", "h:1", "--data", "/")
    assert "line 2: accept.maximum_round: unknown key; did you mean 'maximum_rounds'" in done.output
    assert done.exit_code == 3


def test_the_ledger_is_shown_as_a_table_and_as_json(tmp_path: Path) -> None:
    StateFolder(tmp_path / "state")
    assert "Nothing with noise" in run("ledger").output
    release = Release("2026-01-01T00:00:00+00:00", "r1", "ward", 1, "aa", 0.5, 2.0, 1e-5, 2.22, 3.33)
    ledger = Ledger(StateFolder(tmp_path / "state").ledger)
    ledger.record(release)
    ledger.record(replace(release, round=2))
    table = run("ledger").output.splitlines()
    assert len(table) == 3
    assert "ward" in table[2]
    assert "2.22" in table[2]
    assert [entry["round"] for entry in json.loads(run("ledger", "--json").stdout)] == [1, 2]


def test_an_export_says_of_which_version_and_round_it_is(tmp_path: Path) -> None:
    state = StateFolder(tmp_path / "state")
    RunBook(state.runs).note("r1", Plan.model_validate({"name": "ward", "model": {"name": "m"}}), "joined")
    private = state.private("r1")
    private.mkdir()
    array = {"m.q_proj.lora_A.weight": np.ones((2, 3), np.float32)}
    out = str(tmp_path / "out")
    for version, round_number, told in (
        (6, 7, "version 6 and what this site has trained in round 7"),
        (7, 7, "version 7"),
    ):
        save_file(array, private / own_adapter.FILE, own_adapter.facts('{"r": 2}', version, round_number))
        assert f"(ward), of {told}: 1 tensors, {out}" in run("export", "ward", out, "--force").output
        assert json.loads(run("export", "r1", out, "--force", "--json").stdout) == {
            "run_id": "r1",
            "folder": out,
            "tensors": 1,
            "version": version,
            "round": round_number,
            "mixed": False,
        }
    both = {**array, **{f"{prefix}{name}": tensor for prefix in ("rest/", "gate/") for name, tensor in array.items()}}
    save_file(both, private / own_adapter.FILE, own_adapter.facts('{"r": 2}', 1, 1))
    assert "with the adapter in its folder rest" in run("export", "ward", out, "--force").output
    for place in (Path(out), Path(out) / "rest"):
        assert load_file(place / "adapter_model.safetensors").keys() == array.keys()
        assert json.loads((place / "adapter_config.json").read_text()) == {"r": 2}
    assert load_file(Path(out) / "mixer.safetensors").keys() == array.keys()
    save_file(array, private / own_adapter.FILE, {"adapter_config": "{}"})  # an older fsllm's
    assert "(ward): 1 tensors" in run("export", "ward", out, "--force").output


@pytest.mark.parametrize(
    ("name", "why"),
    [("fedavg", "one model for all sites"), ("fedalt", "is more than an adapter"), ("ditto", "for this run yet")],
)
def test_an_export_that_can_not_be_says_why(
    name: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As a rule of another package may be, that changes the forward pass and says of no adapter that would do it.
    monkeypatch.setattr(RestOfWorld, "beside", LocalRule.beside)
    plan = {"name": "ward", "model": {"name": "m"}, "algorithm": {"name": name}}
    RunBook(StateFolder(tmp_path / "state").runs).note("r1", plan_from_json(json.dumps(plan).encode()), "joined")
    done = run("export", "ward", str(tmp_path / "out"))
    assert done.exit_code == 3
    assert why in done.output


def test_accepting_wakes_the_daemon(tmp_path: Path) -> None:
    state = StateFolder(tmp_path / "state")
    book = RunBook(state.runs)
    book.note("r1", Plan.model_validate({"name": "ward", "model": {"name": "m"}}), "waiting")
    assert "waiting" in run("runs").output
    assert "No daemon runs" in run("accept", "ward").output
    assert book.is_accepted("r1")
    woken: list[int] = []
    before = signal.signal(signal.SIGHUP, lambda number, _: woken.append(number))
    try:
        state.lock()  # this process stands for the daemon
        assert run("accept", "r1").exit_code == 0
    finally:
        state.unlock()
        signal.signal(signal.SIGHUP, before)
    assert woken == [signal.SIGHUP]


def test_the_doctor_tells_what_is_missing_and_counts_rows(tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a", "completion": ""}\n')
    done = run("doctor", "--data", str(data), "--json")
    checks = {check["name"]: check for check in json.loads(done.stdout)}
    assert checks["certificate"]["outcome"] == "failed"
    assert done.exit_code == 6
    assert checks["data"]["message"] == "rows.jsonl 2 rows (1 without an answer: skipped)"
    data.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "secret\n')
    broken = {check["name"]: check for check in json.loads(run("doctor", "--data", str(data), "--json").stdout)}
    assert "rows.jsonl, line 2" in broken["data"]["message"]
    assert "secret" not in json.dumps(broken)
