"""The command line of fsllm without a server: help, plans, discovery, and errors as people see them."""

import json
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from fsllm_common import __version__
from fsllm_common.errors import Exit, FsllmError
from fsllm_operator import cli
from fsllm_operator.cli import main

LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.fixture(autouse=True)
def nobody_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No server, login or variable of this machine is found."""
    for variable in ("FSLLM_SERVER", "FSLLM_CREDENTIAL"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("FSLLM_STATE_DIR", str(tmp_path / "no-server"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "no-login"))


def fsllm(*arguments: str | Path, **more: str) -> Result:
    result = CliRunner().invoke(main, [str(a) for a in arguments], **more)  # type: ignore[arg-type]
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def plan_file(folder: Path, text: str = "") -> Path:
    path = folder / "plan.yaml"
    path.write_text(f"name: x\nmodel: {{name: some-llama}}\n{text}")
    return path


def test_help_teaches() -> None:
    result = fsllm("--help")
    assert result.exit_code == 0
    for words in ("fsllm site invite hospital-a -o hospital-a.join", "FSLLM_SERVER", "11 the run is paused"):
        assert words in result.stdout


def test_version() -> None:
    assert fsllm("--version").stdout == f"fsllm, version {__version__}\n"


def every_command(group: click.Group, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    context = click.Context(group)
    found: list[tuple[str, ...]] = []
    for name in group.list_commands(context):
        if name == "demo":
            continue
        command = group.get_command(context, name)
        assert command is not None
        found.append((*path, name))
        if isinstance(command, click.Group):
            found += every_command(command, (*path, name))
    return found


@pytest.mark.parametrize("command", every_command(main), ids=" ".join)
def test_every_command_has_help(command: tuple[str, ...]) -> None:
    result = fsllm(*command, "--help")
    assert result.exit_code == 0
    assert result.stdout.startswith(f"Usage: main {' '.join(command)}")


def test_listings_and_changes_speak_json() -> None:
    """Every command that prints a result has --json; those that write a file for a person have not."""
    without = {
        command
        for command in every_command(main)
        if "--json" not in fsllm(*command, "--help").stdout and command[-1] not in ("run", "site", "operator", "plan")
    }
    assert without == {("login",), ("operator", "invite"), ("site", "invite"), ("plan", "example"), ("plan", "schema")}


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from click.testing import CliRunner; from fsllm_operator.cli import main; "
        "CliRunner().invoke(main, ['--help']); "
        "sys.stdout.write(' '.join(m for m in ('grpc', 'rich', 'numpy', 'torch', 'pydantic') if m in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == ""


def test_the_demo_says_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cli._COMMANDS, "demo", "no_such_package.cli:demo")
    result = fsllm("demo")
    assert result.exit_code == Exit.CONFIGURATION
    assert "needs the package no_such_package, which is not installed [TRAINER_MISSING]" in result.stderr
    assert "pip install 'fsllm[bench]'" in result.stderr


def test_an_unknown_command() -> None:
    assert fsllm("rnu").exit_code == Exit.USAGE


def test_errors_are_two_lines_and_an_exit_code() -> None:
    result = fsllm("run", "list")
    assert result.exit_code == Exit.IDENTITY
    assert result.stdout == ""
    first, second = result.stderr.splitlines()
    assert first.startswith("Error: No operator's credential in ")
    assert first.endswith(" [NOT_ENROLLED]")
    assert "fsllm login --join FILE" in second


def test_ctrl_c_is_clean(monkeypatch: pytest.MonkeyPatch) -> None:
    @click.command()
    def demo() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fsllm_operator.cli.interrupted", demo, raising=False)
    monkeypatch.setitem(cli._COMMANDS, "demo", "fsllm_operator.cli:interrupted")
    result = fsllm("demo")
    assert (result.exit_code, result.output.strip()) == (130, "")


def test_a_bug_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    @click.command()
    def demo() -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("fsllm_operator.cli.broken", demo, raising=False)
    monkeypatch.setitem(cli._COMMANDS, "demo", "fsllm_operator.cli:broken")
    assert isinstance(CliRunner().invoke(main, ["demo"]).exception, ZeroDivisionError)


class TestPlanCheck:
    """fsllm plan check."""

    def test_counts_bytes_from_a_model_folder(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text(json.dumps(LLAMA))
        plan = plan_file(tmp_path, "rounds: 5\nadapter: {rank: 4, targets: [q_proj]}")
        found = json.loads(fsllm("plan", "check", plan, "--model", tmp_path, "--json").stdout)
        # Two blocks of 4 x (64 + 64), two bytes each in bf16; down and up, five rounds.
        assert found["parameters"] == 1024
        assert found["bytes_up_per_round_and_site"] == found["bytes_down_per_round_and_site"] == 2048
        assert found["bytes_per_site"] == 20_480
        assert found["epsilon"] is None
        assert found["plan"]["train"]["steps"] == 30

    def test_asks_for_what_it_can_not_know(self, tmp_path: Path) -> None:
        plan = plan_file(tmp_path)
        result = fsllm("plan", "check", plan)
        assert result.exit_code == 0
        assert "give --model FOLDER or --parameters COUNT" in result.stdout
        assert json.loads(fsllm("plan", "check", plan, "--json").stdout)["bytes_per_site"] is None
        assert "2.0 MiB down and 2.0 MiB up" in fsllm("plan", "check", plan, "--parameters", "1048576").stdout

    def test_a_noop_plan_needs_no_model(self, tmp_path: Path) -> None:
        path = tmp_path / "plan.yaml"
        path.write_text(
            "name: x\nrounds: 1\nmodel: {name: synthetic}\nalgorithm: {name: noop}\nwire: {element_type: fp32}"
        )
        found = json.loads(fsllm("plan", "check", path, "--json").stdout)
        assert found["bytes_up_per_round_and_site"] == 8 * 2**20

    def test_says_when_the_noise_drowns_the_signal(self, tmp_path: Path) -> None:
        """The figures of a well-known reality: z 10, 100 rounds, ten sites, 8.4 million parameters."""
        plan = plan_file(
            tmp_path,
            "rounds: 100\nalgorithm: {weighting: uniform}\ncohort: {size: 10}\n"
            "pipeline: [{stage: clip, norm: 1}, {stage: noise, multiplier: 10, delta: 1.0e-5}]",
        )
        found = json.loads(fsllm("plan", "check", plan, "--parameters", "8400000", "--json").stdout)
        assert found["noise_to_signal"] == pytest.approx(9165, rel=1e-3)
        assert 4.5 < found["epsilon"] < 5.3
        assert any("drowns the signal" in warning for warning in found["warnings"])
        text = fsllm("plan", "check", plan, "--parameters", "8400000").stdout
        assert "9.17e+03 times the largest signal" in text
        assert "Warning:" in text

    @pytest.mark.parametrize(("method", "sent"), [("ffa-lora", 4 * 2 * 64), ("fedkseed", 4096)])
    def test_the_noise_is_compared_over_what_is_sent(self, tmp_path: Path, method: str, sent: int) -> None:
        (tmp_path / "config.json").write_text(json.dumps(LLAMA))
        plan = plan_file(
            tmp_path,
            "adapter: {rank: 4, targets: [q_proj]}\ncohort: {size: 4}\n"
            "train: {optimizer: sgd, max_grad_norm: 0}\n"
            f"algorithm: {{name: {method}, weighting: uniform}}\n"
            "pipeline: [{stage: clip, norm: 1}, {stage: noise, multiplier: 1}]",
        )
        found = json.loads(fsllm("plan", "check", plan, "--model", tmp_path, "--json").stdout)
        assert found["noise_to_signal"] == pytest.approx((sent / 4) ** 0.5)
        assert any(f"the {sent} numbers of an update" in warning for warning in found["warnings"])

    def test_what_each_site_adds_to_the_download_is_said_to_be_the_least(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text(json.dumps(LLAMA))
        adapter = "adapter: {rank: 4, targets: [q_proj]}\nalgorithm: {name: flora}\n"
        # Two sites' ledger entries are as large as their two adapters: with the fresh one, three times the upload.
        open_ = fsllm("plan", "check", plan_file(tmp_path, adapter), "--model", tmp_path).stdout
        assert "at least 6.0 KiB down and 2.0 KiB up" in open_
        named = fsllm("plan", "check", plan_file(tmp_path, adapter + "cohort: {size: 2}"), "--model", tmp_path).stdout
        assert "bf16: 6.0 KiB down" in named

    def test_a_wrong_key_is_named_with_its_cure(self, tmp_path: Path) -> None:
        plan = plan_file(tmp_path, "cohort: {quorm: 3}")
        result = fsllm("plan", "check", plan)
        assert result.exit_code == Exit.CONFIGURATION
        assert f"{plan}: cohort.quorm: unknown key; did you mean 'quorum'? [PLAN_INVALID]" in result.stderr
        as_json = fsllm("plan", "check", plan, "--json")
        assert as_json.exit_code == Exit.CONFIGURATION
        assert json.loads(as_json.stdout)["valid"] is False

    def test_an_impossible_combination(self, tmp_path: Path) -> None:
        result = fsllm("plan", "check", plan_file(tmp_path, "cohort: {sites: [a], quorum: 2}"))
        assert result.exit_code == Exit.CONFIGURATION
        assert "cohort.quorum, cohort.sites" in result.stderr

    def test_a_target_that_is_not_in_the_model(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text(json.dumps(LLAMA))
        result = fsllm("plan", "check", plan_file(tmp_path, "adapter: {targets: [W_pack]}"), "--model", tmp_path)
        assert result.exit_code == Exit.MODEL
        assert "'W_pack' is no linear layer" in result.stderr


def test_schema_is_json_schema() -> None:
    schema = json.loads(fsllm("plan", "schema").stdout)
    assert schema["properties"]["cohort"]
    assert "| `cohort.quorum` | integer, > 0 | `2` |" in fsllm("plan", "schema", "--markdown").stdout


def test_submit_checks_the_plan_before_it_looks_for_more(tmp_path: Path) -> None:
    """The first error is about the server here: nothing is sent without one."""
    assert fsllm("run", "submit", plan_file(tmp_path)).exit_code == Exit.IDENTITY


@pytest.mark.parametrize("valid", ["0h", "72", "5w", "-1h", "1.5h", ""])
def test_a_span_of_time_that_is_none(valid: str) -> None:
    result = fsllm("site", "invite", "a", "-o", "a.join", "--valid", valid)
    assert result.exit_code == Exit.USAGE
    assert "is not a span of time; write for example 90m, 72h or 3d" in result.stderr


def test_every_failure_has_a_documented_exit_code() -> None:
    from fsllm_common.failure import Failure

    assert Failure(FsllmError("DISK_FULL", "x")).exit_code == Exit.STORAGE
