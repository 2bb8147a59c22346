"""fsllm against a real server process: invitations, logins, runs, watching, and a noop run of two daemons."""

import json
import os
import secrets
import signal
import subprocess
import sysconfig
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from tests.system.harness import ServerProcess

from fsllm_client.site.synthetic import delta_value
from fsllm_common.errors import Exit
from fsllm_common.identity.authority import CertificateAuthority
from fsllm_common.identity.join import read_join_file
from fsllm_common.identity.keys import accept_chain, load_credential, make_key, make_request, save_credential
from fsllm_common.identity.names import Member, Role
from fsllm_operator.cli import main

NOOP = """\
name: bench
rounds: 2
model: {name: synthetic}
algorithm: {name: noop, synthetic: {tensors: 3, mebibytes: 2.5}}
cohort: {quorum: 2}
timing: {gather_seconds: 0.01}
"""


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """One server for the tests that leave it standing."""
    with ServerProcess(tmp_path_factory.mktemp("shared") / "server") as process:
        yield process


@pytest.fixture
def no_login(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    for variable in ("FSLLM_SERVER", "FSLLM_CREDENTIAL"):
        monkeypatch.delenv(variable, raising=False)


@pytest.fixture
def server(shared: ServerProcess, monkeypatch: pytest.MonkeyPatch, no_login: None) -> ServerProcess:
    """The shared server, whose state folder fsllm finds as it does on the server's host."""
    monkeypatch.setenv("FSLLM_STATE_DIR", str(shared.state))
    return shared


@pytest.fixture
def fragile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_login: None) -> Iterator[ServerProcess]:
    """A server of the test's own."""
    monkeypatch.setenv("FSLLM_STATE_DIR", str(tmp_path / "server"))
    with ServerProcess(tmp_path / "server") as process:
        yield process


@pytest.fixture
def name() -> str:
    """A name that no other test has used for a member or a run."""
    return f"x-{secrets.token_hex(4)}"


def fsllm(*arguments: str | Path, stdin: str | None = None) -> Result:
    result = CliRunner().invoke(main, [str(a) for a in arguments], input=stdin)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def standings() -> dict[str, str]:
    return {m["name"]: m["standing"] for m in json.loads(fsllm("site", "list", "--json").stdout)}


@pytest.fixture
def noop(tmp_path: Path, name: str) -> Path:
    path = tmp_path / "noop.yaml"
    path.write_text(NOOP.replace("bench", name))
    return path


@pytest.mark.usefixtures("server")
class TestMembers:
    """Inviting, listing, revoking."""

    def test_a_join_file(self, tmp_path: Path, name: str) -> None:
        output = tmp_path / "a.join"
        result = fsllm("site", "invite", name, "-o", output, "--host", "fed.example.org", "--valid", "2h")
        assert result.exit_code == 0
        assert output.stat().st_mode & 0o777 == 0o600
        join = read_join_file(output)
        assert (join.name, join.role, join.host) == (name, Role.SITE, "fed.example.org")
        assert f"fsllm-client --server fed.example.org:{join.port} --data ./private --join a.join" in result.stdout
        assert standings()[name] == "invited"

    def test_an_evaluator(self, tmp_path: Path, name: str) -> None:
        fsllm("site", "invite", name, "-o", tmp_path / "j.join", "--role", "evaluator")
        assert read_join_file(tmp_path / "j.join").role is Role.EVALUATOR

    def test_a_file_that_can_not_be_written_costs_no_token(self, tmp_path: Path, name: str) -> None:
        taken = tmp_path / "taken"
        taken.write_text("precious")
        for output in (taken, tmp_path / "no-folder" / "a.join"):
            assert fsllm("site", "invite", name, "-o", output).exit_code == Exit.CONFIGURATION
        assert taken.read_text() == "precious"
        assert name not in standings()

    def test_a_name_that_is_none(self, tmp_path: Path) -> None:
        result = fsllm("site", "invite", "Hospital A", "-o", tmp_path / "a.join")
        assert (result.exit_code, (tmp_path / "a.join").exists()) == (Exit.USAGE, False)

    def test_revoking_asks(self, server: ServerProcess, name: str) -> None:
        server.enroll(name)
        assert fsllm("site", "revoke", name, stdin="n\n").exit_code == 1
        assert standings()[name] == "enrolled"
        assert fsllm("site", "revoke", name, stdin="y\n").exit_code == 0
        assert standings()[name] == "revoked"

    def test_revoking_without_a_question(self, server: ServerProcess, name: str) -> None:
        server.enroll(name)
        told = json.loads(fsllm("site", "revoke", name, "--yes", "--json").stdout)
        assert (told["name"], told["standing"]) == (name, "revoked")

    def test_nobody_to_revoke(self) -> None:
        result = fsllm("site", "revoke", "nobody", "--yes")
        assert result.exit_code == Exit.REFUSED
        assert "[MEMBER_UNKNOWN]" in result.stderr

    def test_the_list_is_a_table(self) -> None:
        rows = [row.split() for row in fsllm("site", "list").stdout.splitlines()]
        assert rows[0][:4] == ["name", "role", "standing", "attached"]
        assert ["local-operator", "operator", "enrolled", "no"] in [row[:4] for row in rows]


class TestOperators:
    """Logins, and which credential is used."""

    def login(self, server: ServerProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> Path:
        """Make alice an operator of another host, which has no server."""
        join = tmp_path / "alice.join"
        assert fsllm("operator", "invite", name, "-o", join, "--host", "localhost").exit_code == 0
        monkeypatch.setenv("FSLLM_STATE_DIR", str(tmp_path / "nothing"))
        assert fsllm("run", "list").exit_code == Exit.IDENTITY
        assert fsllm("login", "--join", join).exit_code == 0
        return join

    def test_login(self, server: ServerProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        join = self.login(server, tmp_path, monkeypatch, name)
        folder = tmp_path / "config" / "fsllm" / "operator"
        assert {path.name for path in folder.iterdir()} == {"credential.pem", "server.json"}
        assert (folder / "credential.pem").stat().st_mode & 0o777 == 0o600
        assert standings()[name] == "enrolled"
        again = fsllm("login", "--join", join, "--folder", tmp_path / "elsewhere")
        assert again.exit_code == Exit.IDENTITY
        assert "[JOIN_TOKEN_USED]" in again.stderr

    def test_an_answer_that_was_lost(
        self, server: ServerProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
    ) -> None:
        """The key is kept before the token is spent: the same command gets the same certificate."""
        join = tmp_path / "alice.join"
        fsllm("operator", "invite", name, "-o", join, "--host", "localhost")
        folder = tmp_path / "login"
        with monkeypatch.context() as broken:
            broken.setattr("fsllm_operator.login.accept_chain", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            assert fsllm("login", "--join", join, "--folder", folder).exit_code == 130
        assert fsllm("login", "--join", join, "--folder", folder).exit_code == 0
        assert not (folder / "pending-key.pem").exists()

    @pytest.mark.usefixtures("server")
    def test_a_sites_join_file_is_not_an_operators(self, tmp_path: Path, name: str) -> None:
        fsllm("site", "invite", name, "-o", tmp_path / "a.join")
        result = fsllm("login", "--join", tmp_path / "a.join")
        assert result.exit_code == Exit.IDENTITY
        assert f"for the site '{name}', not for an operator" in result.stderr

    def test_a_login_is_renewed_on_use(
        self, server: ServerProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
    ) -> None:
        self.login(server, tmp_path, monkeypatch, name)
        folder = tmp_path / "config" / "fsllm" / "operator"
        before = load_credential(folder)
        assert fsllm("run", "list").exit_code == 0
        assert load_credential(folder) == before
        # Past two thirds of its life: its 100 seconds have 5 minutes of tolerance before them.
        authority = CertificateAuthority.load(server.state / "authority")
        key = make_key()
        old = authority.issue(make_request(key), Member("fsllm", Role.OPERATOR, name), timedelta(seconds=100))
        save_credential(folder, accept_chain(key, old, authority.pem))
        assert fsllm("run", "list").exit_code == 0
        renewed = load_credential(folder)
        assert renewed.key != key
        assert renewed.certificate.not_after > load_credential(
            server.state / "operator"
        ).certificate.not_before + timedelta(hours=20)

    def test_a_site_is_no_operator(self, server: ServerProcess, tmp_path: Path, name: str) -> None:
        save_credential(tmp_path / "site", server.enroll(name))
        result = fsllm("run", "list", "--credential", tmp_path / "site", "--server", server.address)
        assert result.exit_code == Exit.REFUSED
        assert "[ROLE_FORBIDDEN]" in result.stderr

    def test_another_federations_operator(self, server: ServerProcess, tmp_path: Path) -> None:
        authority = CertificateAuthority.create(tmp_path / "other", "fsllm")
        key = make_key()
        chain = authority.issue(make_request(key), Member("fsllm", Role.OPERATOR, "eve"))
        save_credential(tmp_path / "eve", accept_chain(key, chain, authority.pem))
        result = fsllm("run", "list", "--credential", tmp_path / "eve", "--server", server.address)
        assert result.exit_code == Exit.IDENTITY
        assert "[CERTIFICATE_UNTRUSTED]" in result.stderr


class TestDoctor:
    """What an operator sees from here."""

    def test_all_is_well(self, fragile: ServerProcess, name: str) -> None:
        fragile.enroll(name)
        result = fsllm("doctor", "--json")
        assert result.exit_code == 0
        found = {check["name"]: check for check in json.loads(result.stdout)}
        assert {name: check["outcome"] for name, check in found.items() if check["outcome"] != "ok"} == {
            "members": "warning"
        }
        assert f"away: {name}" in found["members"]["message"]
        assert found["key exchange"]["message"].startswith("X25519")
        assert "fsllm-client doctor" in fsllm("doctor").stdout

    def test_a_server_that_is_down(self, fragile: ServerProcess) -> None:
        fragile.kill()
        result = fsllm("doctor", "--json")
        assert result.exit_code == Exit.UNAVAILABLE
        assert [check["outcome"] for check in json.loads(result.stdout)] == ["ok", "failed"]
        assert fsllm("run", "list").exit_code == Exit.UNAVAILABLE

    def test_a_server_that_was_stopped(self, fragile: ServerProcess) -> None:
        assert fsllm("run", "list").exit_code == 0
        assert fragile.stop() == 0
        result = fsllm("run", "list")
        assert result.exit_code == Exit.UNAVAILABLE
        assert f"The server that keeps its state in {fragile.state} is not running" in result.stderr


@pytest.mark.usefixtures("server")
class TestRuns:
    """Submitting and steering."""

    def test_submit_list_show(self, noop: Path, name: str) -> None:
        submitted = json.loads(fsllm("run", "submit", noop, "--json").stdout)
        assert (submitted["name"], submitted["status"]) == (name, "running")
        assert submitted["run_id"] in [r["run_id"] for r in json.loads(fsllm("run", "list", "--json").stdout)]
        shown = json.loads(fsllm("run", "show", name, "--json").stdout)
        assert shown["plan"]["algorithm"]["synthetic"] == {"mebibytes": 2.5, "tensors": 3}
        assert name in fsllm("run", "list").stdout
        assert "round 0 of 2" in fsllm("run", "show", submitted["run_id"][:6]).stdout

    def test_a_bad_plan_is_not_sent(self, tmp_path: Path, name: str) -> None:
        (tmp_path / "bad.yaml").write_text(f"name: {name}\nmodel: {{name: embedded}}\nround: 3\n")
        result = fsllm("run", "submit", tmp_path / "bad.yaml")
        assert result.exit_code == Exit.CONFIGURATION
        assert "round: unknown key; did you mean 'rounds'?" in result.stderr
        assert name not in [r["name"] for r in json.loads(fsllm("run", "list", "--json").stdout)]

    def test_pause_resume_cancel(self, noop: Path, name: str) -> None:
        fsllm("run", "submit", noop)
        assert "is paused" in fsllm("run", "pause", name).stdout
        assert json.loads(fsllm("run", "resume", name, "--json").stdout)["status"] == "running"
        again = fsllm("run", "resume", name)
        assert (again.exit_code, "[RUN_NOT_PAUSED]" in again.stderr) == (Exit.REFUSED, True)
        assert fsllm("run", "cancel", name, stdin="n\n").exit_code == 1
        assert fsllm("run", "cancel", name, "--yes").exit_code == 0
        ended = fsllm("run", "cancel", name, "--yes")
        assert (ended.exit_code, "[RUN_ENDED]" in ended.stderr) == (Exit.REFUSED, True)

    def test_watching_ends_with_a_pause_and_with_the_end(self, noop: Path, name: str) -> None:
        fsllm("run", "submit", noop)
        fsllm("run", "pause", name)
        paused = fsllm("run", "watch", name)
        assert (paused.exit_code, "[RUN_PAUSED]" in paused.stderr) == (Exit.RUN_FAILED, True)
        fsllm("run", "resume", name)
        fsllm("run", "cancel", name, "--yes")
        # The pause lies in the log still; it is no reason to stop now.
        result = fsllm("run", "watch", name, "--json")
        assert (result.exit_code, "[RUN_CANCELLED]" in result.stderr) == (Exit.RUN_FAILED, True)
        events = [json.loads(row) for row in result.stdout.splitlines()]
        assert [e["subject"] for e in events if e["kind"] == "status"] == ["running", "paused", "running", "cancelled"]

    @pytest.mark.parametrize("command", ["show", "watch", "pause", "resume"])
    def test_no_such_run(self, command: str) -> None:
        result = fsllm("run", command, "nothing")
        assert (result.exit_code, "[RUN_UNKNOWN]" in result.stderr) == (Exit.REFUSED, True)


def script(name: str) -> str:
    return str(Path(sysconfig.get_path("scripts")) / name)


def watching(run: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [script("fsllm"), "run", "watch", run, "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_watching_goes_on_across_a_restart(fragile: ServerProcess, noop: Path, name: str) -> None:
    fsllm("run", "submit", noop)
    watcher = watching(name)
    assert watcher.stdout is not None
    assert json.loads(watcher.stdout.readline())["kind"] == "status"
    fragile.kill()
    fragile.restart()
    fsllm("run", "cancel", name, "--yes")
    out, err = watcher.communicate(timeout=60)
    assert watcher.returncode == Exit.RUN_FAILED
    assert "waiting for it" in err
    sequences = [json.loads(row)["sequence"] for row in out.splitlines()]
    assert sequences == sorted(set(sequences))
    assert json.loads(out.splitlines()[-1])["subject"] == "cancelled"


@pytest.mark.slow
def test_ctrl_c_leaves_the_run_alone(server: ServerProcess, noop: Path, name: str) -> None:
    fsllm("run", "submit", noop)
    watcher = watching(name)
    assert watcher.stdout is not None
    watcher.stdout.readline()
    watcher.send_signal(signal.SIGINT)
    _, err = watcher.communicate(timeout=30)
    assert watcher.returncode == 130
    assert "The run goes on" in err
    assert "Traceback" not in err
    assert json.loads(fsllm("run", "show", name, "--json").stdout)["status"] == "running"


@pytest.mark.slow
def test_a_run_of_two_daemons_and_its_export(fragile: ServerProcess, noop: Path, tmp_path: Path, name: str) -> None:
    """The noop rule has a closed form: what is exported is what the rounds must have made."""
    from safetensors.numpy import load_file

    (tmp_path / "data.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    daemons = []
    try:
        for site in ("a", "b"):
            join = tmp_path / f"{site}.join"
            assert fsllm("site", "invite", site, "-o", join, "--host", "localhost").exit_code == 0
            command = [script("fsllm-client"), "--server", fragile.address, "--data", str(tmp_path / "data.jsonl")]
            with (tmp_path / f"{site}.log").open("wb") as log:
                environment = {**os.environ, "FSLLM_STATE_DIR": str(tmp_path / site)}
                daemons.append(subprocess.Popen([*command, "--join", str(join)], env=environment, stderr=log))
        submitted = subprocess.run(
            [script("fsllm"), "run", "submit", str(noop), "--watch"],
            capture_output=True,
            text=True,
            timeout=90,
            check=False,
        )
        assert submitted.returncode == 0, submitted.stdout + submitted.stderr
        assert f"Run {name} is done: 2 rounds." in submitted.stdout
        attached = {m["name"] for m in json.loads(fsllm("site", "list", "--json").stdout) if m["attached"]}
        assert attached == {"a", "b"}
    finally:
        for daemon in daemons:
            daemon.terminate()
        for daemon in daemons:
            daemon.wait(30)
    shown = json.loads(fsllm("run", "show", name, "--json").stdout)
    assert [commit["round"] for commit in shown["commits"]] == [0, 1, 2]
    assert [c["member"] for c in shown["commits"][2]["contributions"]] == ["a", "b"]
    out = tmp_path / "adapter"
    exported = json.loads(fsllm("run", "export", name, "-o", out, "--json").stdout)
    assert (exported["version"], exported["tensors"]) == (2, 3)
    assert exported["digest"] == shown["commits"][2]["digest"]
    versions = {}
    for number in (0, 1, 2):
        fsllm("run", "export", name, "-o", tmp_path / str(number), "--version", str(number))
        versions[number] = load_file(tmp_path / str(number) / "adapter_model.safetensors")
    latest = load_file(out / "adapter_model.safetensors")
    assert sum(array.size for array in latest.values()) == exported["parameters"] == int(2.5 * 2**20 / 4)
    for tensor, array in latest.items():
        assert (array == versions[2][tensor]).all()
        for commit in shown["commits"][1:]:
            number = commit["round"]
            made = sum(c["weight"] * delta_value(c["member"], number) for c in commit["contributions"])
            moved = versions[number][tensor] - versions[number - 1][tensor]
            # Published in bf16: eight bits of values below 4.
            assert abs(moved - made).max() < 2**-6
            assert made > 2**-6
    assert "adapter_config.json" not in {path.name for path in out.iterdir()}
