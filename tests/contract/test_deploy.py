"""What lies in deploy/ is accepted by the tools that will read it, and agrees with the daemons' own settings."""

import shutil
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import pytest
import yaml

from fsllm_client.settings import ClientSettings
from fsllm_common.settings import load
from fsllm_server.settings import ServerSettings

DEPLOY = Path(__file__).parents[2] / "deploy"
UNITS = sorted((DEPLOY / "systemd").glob("*.service"))
BASE = DEPLOY / "kubernetes" / "base"


def _tool(name: str, package: str) -> str:
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed (Debian's package {package})")
    return found


@pytest.fixture(params=UNITS, ids=lambda unit: unit.name)
def unit(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A unit whose command is that of this environment: systemd-analyze wants it to exist."""
    source: Path = request.param
    text = source.read_text()
    assert "/opt/fsllm/bin/" in text
    copy = tmp_path / source.name
    copy.write_text(text.replace("/opt/fsllm/bin", sysconfig.get_path("scripts")))
    return copy


def test_there_is_a_unit_for_each_daemon() -> None:
    assert [unit.name for unit in UNITS] == ["fsllm-client.service", "fsllm-server.service"]


def test_units_are_clean(unit: Path) -> None:
    done = subprocess.run(
        [_tool("systemd-analyze", "systemd"), "verify", str(unit)], capture_output=True, text=True, check=False
    )
    # An unknown key is only a warning on stderr.
    assert (done.returncode, done.stderr, done.stdout) == (0, "", "")


@pytest.mark.parametrize(("name", "limit"), [("fsllm-server.service", 2.0), ("fsllm-client.service", 4.0)])
def test_units_are_hardened(name: str, limit: float) -> None:
    """10 is a unit without any protection; the client needs devices, a file system and the network."""
    command = [_tool("systemd-analyze", "systemd"), "security", "--offline=yes", f"--threshold={int(limit * 10)}"]
    done = subprocess.run([*command, str(DEPLOY / "systemd" / name)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-300:] + done.stderr


def test_no_trainer_outlives_its_daemon() -> None:
    for unit in UNITS:
        lines = unit.read_text().splitlines()
        assert "KillMode=control-group" in lines
        assert "Type=notify" in lines


@pytest.fixture(scope="module", params=[".", "server", "client"])
def objects(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[dict[str, object]]]:
    """What kubectl makes of a kustomization: the file and its objects."""
    done = subprocess.run(
        [_tool("kubectl", "kubernetes-client"), "kustomize", str(BASE / request.param)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    out = tmp_path_factory.mktemp("kustomize") / "objects.yaml"
    out.write_text(done.stdout)
    return out, list(yaml.safe_load_all(done.stdout))


def test_kustomize_output_is_valid(objects: tuple[Path, list[dict[str, object]]]) -> None:
    validator = Path(sysconfig.get_path("scripts")) / "kubernetes-validate"
    done = subprocess.run(
        [sys.executable, str(validator), "--strict", str(objects[0])], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_object_is_in_the_namespace(objects: tuple[Path, list[dict[str, object]]]) -> None:
    for one in objects[1]:
        metadata = one["metadata"]
        assert isinstance(metadata, dict)
        assert one["kind"] == "Namespace" or metadata["namespace"] == "fsllm"


def test_pods_meet_the_restricted_standard(objects: tuple[Path, list[dict[str, object]]]) -> None:
    for one in objects[1]:
        if one["kind"] != "StatefulSet":
            continue
        pod = one["spec"]["template"]["spec"]  # type: ignore[index]
        assert pod["securityContext"]["runAsNonRoot"]
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in [*pod["containers"], *pod.get("initContainers", [])]:
            context = container["securityContext"]
            assert context["allowPrivilegeEscalation"] is False
            assert context["capabilities"] == {"drop": ["ALL"]}
            assert context["readOnlyRootFilesystem"]


def test_the_settings_files_are_the_daemons_own() -> None:
    """And the ports in the objects are those that the settings open."""
    server = load(ServerSettings, {}, BASE / "server" / "server.toml", environment={})
    client = load(ClientSettings, {}, BASE / "client" / "client.toml", environment={})
    assert client.join is not None
    assert client.server == f"fsllm-server:{server.port}"
    stateful = yaml.safe_load((BASE / "server" / "statefulset.yaml").read_text())
    ports = {p["name"]: p["containerPort"] for p in stateful["spec"]["template"]["spec"]["containers"][0]["ports"]}
    assert ports == {"grpc": server.port, "enrollment": server.chosen_enrollment_port, "web": server.metrics_port}
    service = yaml.safe_load((BASE / "server" / "service.yaml").read_text())
    assert {p["port"] for p in service["spec"]["ports"]} == {server.port, server.chosen_enrollment_port}
    stateful = yaml.safe_load((BASE / "client" / "statefulset.yaml").read_text())
    (web,) = stateful["spec"]["template"]["spec"]["containers"][0]["ports"]
    assert web["containerPort"] == client.metrics_port


def test_environment_variables_are_settings() -> None:
    for end, model in (("server", ServerSettings), ("client", ClientSettings)):
        stateful = yaml.safe_load((BASE / end / "statefulset.yaml").read_text())
        for variable in stateful["spec"]["template"]["spec"]["containers"][0]["env"]:
            assert variable["name"].removeprefix("FSLLM_").lower() in model.model_fields


def test_settings_files_are_toml() -> None:
    for path in BASE.rglob("*.toml"):
        assert tomllib.loads(path.read_text())
