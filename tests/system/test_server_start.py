"""A server from its first start to its end, by its command: what it makes, says, refuses, and what it weighs."""

import json
import shutil
import socket
import ssl
import stat
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography import x509
from grpc_health.v1 import health_pb2, health_pb2_grpc  # type: ignore[import-untyped]
from prometheus_client.parser import text_string_to_metric_families
from tests.system.harness import CALL_SECONDS, ServerEnded, ServerProcess, reason_of
from tests.system.peer import Peer

from fsllm.v1 import control_pb2 as control
from fsllm_common.errors import Exit
from fsllm_common.identity.keys import check_credential

pytestmark = pytest.mark.slow

PLAN = """
name: from-the-start
rounds: 1
model: {name: synthetic}
algorithm: {name: noop}
evaluate: {every: 0, metrics: []}
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with ServerProcess(tmp_path_factory.mktemp("fsllm") / "server") as server:
        yield server


def doctor(state: Path, *arguments: str) -> tuple[int, dict[str, dict[str, str]]]:
    """Run the doctor; return its exit code and its findings by check."""
    command = [sys.executable, "-m", "fsllm_server", "doctor", "--json", "--state-dir", str(state), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    return done.returncode, {finding["check"]: finding for finding in json.loads(done.stdout)}


def fetch(server: ServerProcess, path: str) -> str:
    with urllib.request.urlopen(f"{server.metrics_url}/{path}", timeout=CALL_SECONDS) as answer:  # noqa: S310 - http
        return str(answer.read(), "utf-8")


def test_the_first_start_makes_what_it_needs_and_the_second_keeps_it(tmp_path: Path) -> None:
    server = ServerProcess(tmp_path / "deep" / "server", "--host", "fed.example.org")
    with server:
        modes = {path: stat.S_IMODE(path.stat().st_mode) for path in server.state.rglob("*") if path.is_file()}
        secrets = [server.state / name for name in ("authority/authority.pem", "operator/credential.pem")]
        assert {modes[path] for path in secrets} == {0o600}
        assert stat.S_IMODE(server.state.stat().st_mode) == 0o700
        operator = server.operator()
        check_credential(operator)
        assert operator.member.uri == "spiffe://fsllm/operator/local-operator"
        said = server.output.read_text()
        assert "First start" in said
        assert "fsllm site invite" in said
        names = x509.load_pem_x509_certificate((server.state / "server/credential.pem").read_bytes())
        names_ = names.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        assert names_.get_values_for_type(x509.DNSName)[0] == "fed.example.org"
        assert server.invite("x").host == "fed.example.org"
        assert server.stop() == 0
        assert not (server.state / "server.json").exists()
        server.output.unlink()
        server.restart()
        assert "First start" not in server.output.read_text()
        renewed = server.operator()
        assert renewed.authority == operator.authority
        assert renewed.certificate.serial != operator.certificate.serial
        # The one before is still good: nobody has revoked it.
        assert (
            server.control(operator).GetServer(control.GetServerRequest(), timeout=CALL_SECONDS).federation == "fsllm"
        )
        assert server.stop() == 0


def test_an_idle_server_is_small(server: ServerProcess) -> None:
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    (resident,) = (int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS"))
    assert resident <= 80 * 1024, f"{resident / 1024:.1f} MiB"
    loaded = Path(f"/proc/{server.process.pid}/maps").read_text()
    assert not [name for name in ("numpy", "ml_dtypes", "torch") if f"/{name}/" in loaded]


def test_the_web_port(server: ServerProcess) -> None:
    page = fetch(server, "metrics")
    families = {family.name: family for family in text_string_to_metric_families(page)}
    expiry = families["fsllm_server_certificate_expiry_timestamp_seconds"]
    assert {sample.labels["certificate"] for sample in expiry.samples} == {"authority", "server", "operator"}
    assert families["fsllm_server_disk_free_bytes"].samples[0].value > 0
    if promtool := shutil.which("promtool"):
        subprocess.run([promtool, "check", "metrics"], input=page, text=True, check=True, capture_output=True)
    for path, expected in (("healthz", "alive\n"), ("readyz", "ready\n")):
        assert fetch(server, path) == expected
    with pytest.raises(urllib.error.HTTPError, match="404"):
        fetch(server, "secrets")


def test_grpc_health_and_the_key_exchange(server: ServerProcess) -> None:
    channel = server.channel(server.operator())
    answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=CALL_SECONDS)
    assert answer.status == health_pb2.HealthCheckResponse.SERVING
    told = server.control().GetServer(control.GetServerRequest(), timeout=CALL_SECONDS)
    assert told.key_exchange_group
    assert told.disk_free_bytes > 0


def test_a_second_server_on_the_same_folder(server: ServerProcess) -> None:
    with pytest.raises(ServerEnded, match="STATE_LOCKED") as ended:
        ServerProcess(server.state).start()
    assert ended.value.code == Exit.STORAGE


@pytest.mark.parametrize("flag", ["--port", "--enrollment-port", "--metrics-port"])
def test_a_port_in_use(tmp_path: Path, flag: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ServerEnded, match="PORT_IN_USE") as ended:
            ServerProcess(tmp_path / "server", "--listen", "127.0.0.1", flag, str(port)).start()
    assert ended.value.code == Exit.UNAVAILABLE
    assert str(port) in ended.value.log
    assert "Traceback" not in ended.value.log


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--uploads-at-once", "0"), "--uploads-at-once"),
        (("--federation", "Not A Name"), "--federation"),
        (("--database", "nonsense"), "database"),
        (("--run", "/nowhere/plan.yaml"), "/nowhere/plan.yaml"),
    ],
)
def test_a_wrong_setting(tmp_path: Path, arguments: tuple[str, ...], words: str) -> None:
    with pytest.raises(ServerEnded) as ended:
        ServerProcess(tmp_path / "server", *arguments).start()
    assert ended.value.code == Exit.CONFIGURATION
    assert words in ended.value.log
    assert "Traceback" not in ended.value.log


def test_a_folder_of_another_federation(tmp_path: Path) -> None:
    with ServerProcess(tmp_path / "server", "--federation", "north") as server:
        assert server.told["federation"] == "north"
        server.stop()
    with pytest.raises(ServerEnded, match="'north'") as ended:
        ServerProcess(tmp_path / "server", "--federation", "south").start()
    assert ended.value.code == Exit.CONFIGURATION


def test_a_plan_submitted_at_start(tmp_path: Path) -> None:
    plan = tmp_path / "plan.yaml"
    plan.write_text(PLAN)
    with ServerProcess(tmp_path / "server", "--run", str(plan)) as server:
        server.await_log("run submitted")
        (run,) = server.control().ListRuns(control.ListRunsRequest(), timeout=CALL_SECONDS).runs
        assert (run.name, run.status) == ("from-the-start", control.RUN_STATUS_RUNNING)


def test_sigterm_ends_live_streams_in_good_order(tmp_path: Path) -> None:
    with ServerProcess(tmp_path / "server") as server:
        stream = Peer(server, server.enroll("a")).attach()
        assert server.stop() == 0
        assert reason_of(stream.error()) == "SERVER_STOPPING"
        assert "Traceback" not in server.log


def test_certificates_are_renewed_without_a_restart(tmp_path: Path) -> None:
    def certificate() -> str:
        return ssl.get_server_certificate(("localhost", process.told["enrollment_port"]))

    process = ServerProcess(tmp_path / "server", "--certificate-hours", "0.02")
    # Two thirds of 72 seconds and the five minutes of clock tolerance are over at once.
    with process as server:
        stream = Peer(server, server.enroll("a")).attach()
        before, operator = certificate(), server.operator()
        server.await_log("certificates renewed")
        assert certificate() != before
        assert server.operator() != operator
        # Connections that are up have not noticed.
        stream.close()
        assert list(stream.call) == []


def test_the_doctor(tmp_path: Path, server: ServerProcess) -> None:
    code, fresh = doctor(tmp_path / "never", "--port", "0", "--metrics-port", "0")
    assert code == 0
    assert fresh["server"]["state"] == "note"
    assert not (tmp_path / "never").exists()
    code, running = doctor(
        server.state,
        *("--port", str(server.port), "--enrollment-port", str(server.told["enrollment_port"])),
        *("--metrics-port", str(server.told["metrics_port"])),
    )
    assert code == 0
    assert {finding["state"] for finding in running.values()} == {"good"}
    assert {"server", "port", "disk", "authority", "server certificate", "clock", "database"} <= running.keys()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        code, findings = doctor(
            tmp_path / "never", "--listen", "127.0.0.1", "--port", str(taken.getsockname()[1]), "--metrics-port", "0"
        )
    assert code == Exit.UNAVAILABLE
    assert findings["port"]["state"] == "wrong"
    assert "--port" in findings["port"]["cure"]


def test_the_doctor_on_a_damaged_folder(tmp_path: Path) -> None:
    with ServerProcess(tmp_path / "server") as server:
        server.stop()
    key = tmp_path / "server" / "authority" / "authority.pem"
    key.chmod(0o644)
    for left in (tmp_path / "server").glob("fsllm.sqlite3-*"):
        left.unlink()
    (tmp_path / "server" / "fsllm.sqlite3").write_bytes(b"this is no database, whatever its name says" * 100)
    code, findings = doctor(tmp_path / "server", "--port", "0", "--metrics-port", "0")
    assert code == Exit.STORAGE
    assert findings["authority's key"]["state"] == "wrong"
    assert findings["database"]["state"] == "wrong"
    with pytest.raises(ServerEnded, match="STATE_CORRUPT") as ended:
        ServerProcess(tmp_path / "server").start()
    assert ended.value.code == Exit.STORAGE
