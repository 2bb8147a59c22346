import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import click
import pytest
from click.testing import CliRunner
from pydantic import Field, model_validator

from fsllm_common.errors import SettingsInvalid
from fsllm_common.settings import Settings, load, settings_of, settings_options


class Limits(Settings):
    soft: int = 1


class Example(Settings):
    port: int = Field(default=50051, ge=0, le=65535, description="Where to listen.")
    server: str = Field(description="HOST:PORT of the server.")
    state_dir: Path = Field(default=Path("/var/lib/x"), description="Where state lies.")
    hosts: tuple[str, ...] = Field(default=(), description="Names in the certificate.")
    log_format: Literal["auto", "json"] = Field(default="auto", description="How to log.")
    verbose: bool = Field(default=False, description="Say more.")
    rate: float | None = Field(default=None, gt=0, description="Bytes a second.")
    models: dict[str, Path] = Field(default_factory=dict, description="Name to folder.")
    limits: Limits = Field(default=Limits(), description="Limits.")

    @model_validator(mode="after")
    def _together(self) -> "Example":
        if self.port == 13:
            raise ValueError("port 13 and luck do not go together")
        return self


def values(
    flags: dict[str, Any] | None = None,
    env: dict[str, str] | None = None,
    path: Path | None = None,
    warned: list[str] | None = None,
) -> Example:
    sink = warned if warned is not None else []
    return load(Example, {"server": "s:1", **(flags or {})}, path, environment=env or {}, warn=sink.append)


def refused(flags: dict[str, Any] | None = None, env: dict[str, str] | None = None, path: Path | None = None) -> str:
    with pytest.raises(SettingsInvalid) as caught:
        values(flags, env, path)
    return caught.value.message


def toml(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_flags_go_before_environment_before_file_before_default(tmp_path: Path) -> None:
    path = toml(tmp_path / "s.toml", "port = 3")
    env = {"FSLLM_PORT": "2"}
    assert values({"port": "1"}, env, path).port == 1
    assert values({}, env, path).port == 2
    assert values({"port": None}, {"FSLLM_PORT": ""}, path).port == 3
    assert values().port == 50051
    assert values({"port": "0"}, env, path).port == 0


def test_every_kind_of_value_from_every_source(tmp_path: Path) -> None:
    path = toml(
        tmp_path / "s.toml",
        'hosts = ["a", "b"]\nverbose = true\nrate = 2\nstate_dir = "/x"\nlog_format = "json"\n'
        '[models]\ntiny = "/m"\n[limits]\nsoft = 7\n',
    )
    filed = values(path=path)
    assert (filed.hosts, filed.verbose, filed.rate, filed.state_dir) == (("a", "b"), True, 2.0, Path("/x"))
    assert (filed.log_format, filed.models, filed.limits.soft) == ("json", {"tiny": Path("/m")}, 7)
    env = {"FSLLM_HOSTS": "c, d,", "FSLLM_VERBOSE": "off", "FSLLM_RATE": "1.5", "FSLLM_STATE_DIR": "/y"}
    from_env = values(env=env, path=path)
    assert (from_env.hosts, from_env.verbose, from_env.rate, from_env.state_dir) == (("c", "d"), False, 1.5, Path("/y"))
    flags = values({"hosts": ("e",), "verbose": True, "rate": "9"}, env, path)
    assert (flags.hosts, flags.verbose, flags.rate) == (("e",), True, 9.0)
    assert values({"hosts": ()}, env, path).hosts == ("c", "d")


def test_an_error_names_the_setting_as_it_was_given(tmp_path: Path) -> None:
    assert refused(flags={"port": "70000"}).startswith(
        "--port: input should be less than or equal to 65535 (got '70000')"
    )
    assert refused(env={"FSLLM_PORT": "many"}).startswith("FSLLM_PORT: input should be a valid integer")
    path = toml(tmp_path / "s.toml", "port = -1")
    assert refused(path=path).startswith(f"{path}: port: input should be greater than or equal to 0")
    path = toml(tmp_path / "s.toml", "[limits]\nsoft = 'x'")
    assert refused(path=path).startswith(f"{path}: limits.soft: input should be a valid integer")
    assert "luck" in refused(flags={"port": "13"})
    both = refused(flags={"port": "x"}, env={"FSLLM_RATE": "-1"})
    assert "--port" in both
    assert "FSLLM_RATE" in both
    assert refused(flags={"server": None}) == (
        "--server is required; it may also stand in FSLLM_SERVER or in the settings file as server"
    )


def test_an_unknown_key_of_the_file_is_refused(tmp_path: Path) -> None:
    path = toml(tmp_path / "s.toml", "prot = 1")
    assert refused(path=path) == f"{path}: prot: unknown key; did you mean 'port'?"
    path = toml(tmp_path / "s.toml", "zzzzz = 1")
    assert "known: port, server, state_dir" in refused(path=path)


def test_a_file_that_can_not_be_read_says_which(tmp_path: Path) -> None:
    assert refused(path=tmp_path / "none") == f"{tmp_path / 'none'}: No such file or directory"
    assert "not TOML" in refused(path=toml(tmp_path / "s.toml", "port ="))
    (tmp_path / "b.toml").write_bytes(b"\xff")
    assert "not TOML" in refused(path=tmp_path / "b.toml")


def test_a_mistyped_variable_is_pointed_out_and_others_are_left_alone() -> None:
    warned: list[str] = []
    values(env={"FSLLM_PORTS": "1", "FSLLM_QUITE_ANOTHER": "1", "PORTS": "1", "FSLLM_CONFIG": "x"}, warned=warned)
    assert warned == ["FSLLM_PORTS is not a setting of this command; did you mean FSLLM_PORT?"]


@click.command()
@settings_options(Example)
@click.option("--other", default="none")
def command(settings: Example, other: str) -> None:
    click.echo(f"{settings.port} {settings.verbose} {','.join(settings.hosts)} {other}")


def test_the_command_takes_its_flags_from_the_model(tmp_path: Path) -> None:
    path = toml(tmp_path / "s.toml", "port = 5\nverbose = true")
    run = CliRunner().invoke
    given = ["--server", "s:1", "--hosts", "a", "--hosts", "b", "--config", str(path), "--other", "x"]
    assert run(command, given).output == "5 True a,b x\n"
    assert run(command, [*given, "--no-verbose", "--port", "6"]).output == "6 False a,b x\n"
    assert run(command, given, env={"FSLLM_PORT": "7"}).output == "7 True a,b x\n"
    assert run(command, ["--server", "s:1"], env={"FSLLM_CONFIG": str(path)}).output == "5 True  none\n"
    wrong = run(command, ["--port", "x", "--server", "s:1"])
    assert isinstance(wrong.exception, SettingsInvalid)
    assert run(command, ["--prot", "1"]).exit_code == 2


def test_a_default_file_is_read_when_it_is_there(tmp_path: Path) -> None:
    @click.command()
    @settings_options(Example, config_file=tmp_path / "s.toml")
    def with_file(settings: Example) -> None:
        click.echo(settings.port)

    run = CliRunner().invoke
    assert run(with_file, ["--server", "s"]).output == "50051\n"
    toml(tmp_path / "s.toml", "port = 8")
    assert run(with_file, ["--server", "s"]).output == "8\n"


def test_help_shows_each_form_of_each_setting() -> None:
    text = " ".join(CliRunner().invoke(command, ["--help"]).output.split())
    assert "--port INTEGER Where to listen. [env: FSLLM_PORT; file: port; default: 50051]" in text
    assert "--state-dir PATH Where state lies. [env: FSLLM_STATE_DIR; file: state_dir; default: /var/lib/x]" in text
    assert "--verbose / --no-verbose Say more. [env: FSLLM_VERBOSE; file: verbose; default: off]" in text
    assert "--log-format [auto|json]" in text
    assert "--rate NUMBER" in text
    assert "[env: FSLLM_CONFIG]" in text
    assert "--models" not in text


def test_the_table_for_the_docs_has_every_setting() -> None:
    table = settings_of(Example)
    assert [s.key for s in table] == list(Example.model_fields)
    assert {s.key: s.kind for s in table if s.kind != "value"} == {
        "hosts": "list",
        "verbose": "switch",
        "models": "table",
        "limits": "table",
    }
    assert all(s.help for s in table)


def test_a_daemons_modules_load_nothing_heavy() -> None:
    """What both daemons import of common; each of these costs 5 to 200 MiB of an idle daemon's memory."""
    code = (
        "import fsllm_common.settings, fsllm_common.plan, fsllm_common.plan.advice, fsllm_common.identity.credentials, "
        "fsllm_common.identity.probe, fsllm_common.tensors.chunks, fsllm_common.pipeline, "
        "fsllm_common.accounting.budget, fsllm_common.rpc_errors, sys; "
        "heavy = {'numpy', 'ml_dtypes', 'yaml', 'torch', 'safetensors', 'pydantic_settings', 'rich', 'sqlalchemy'}; "
        "sys.exit(', '.join(heavy & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
