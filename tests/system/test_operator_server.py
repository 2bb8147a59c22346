"""fsllm against a real server process: invitations, logins, runs, watching across a restart, and two daemons' noop run."""

import json
import os
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from tests.system.harness import ServerProcess

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


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ServerProcess]:
    with ServerProcess(tmp_path / "server") as process:
        yield process


@pytest.fixture(autouse=True)
def this_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """fsllm finds the server's state folder, as it does on the server's host, and no login."""
    monkeypatch.setenv("FSLLM_STATE_DIR", str(tmp_path / "server"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    for variable in ("FSLLM_SERVER", "FSLLM_CREDENTIAL"):
        monkeypatch.delenv(variable, raising=False)


def fsllm(*arguments: str | Path, stdin: str | None = None) -> Result:
    result = CliRunner().invoke(main, [str(a) for a in arguments], input=stdin)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def standings() -> dict[str, str]:
    return {m["name"]: m["standing"] for m in json.loads(fsllm("site", "list", "--json").stdout)}


@pytest.fixture
def noop(tmp_path: Path) -> Path:
    path = tmp_path / "noop.yaml"
    path.write_text(NOOP)
    return path


@pytest.mark.usefixtures("server")
class TestMembers:
    """Inviting, listing, revoking."""

    def test_a_join_file(self, tmp_path: Path) -> None:
        output = tmp_path / "a.join"
        result = fsllm("site", "invite", "hospital-a", "-o", output, "--host", "fed.example.org", "--valid", "2h")
        assert result.exit_code == 0
        assert output.stat().st_mode & 0o777 == 0o600
        join = read_join_file(output)
        assert (join.name, join.role, join.host) == ("hospital-a", Role.SITE, "fed.example.org")
        assert f"fsllm-client --server fed.example.org:{join.port} --data ./private --join a.join" in result.stdout
        assert standings()["hospital-a"] == "invited"

    def test_an_evaluator(self, tmp_path: Path) -> None:
        fsllm("site", "invite", "judge", "-o", tmp_path / "j.join", "--role", "evaluator")
        assert read_join_file(tmp_path / "j.join").role is Role.EVALUATOR

    def test_a_file_that_can_not_be_written_costs_no_token(self, tmp_path: Path) -> None:
        taken = tmp_path / "taken"
        taken.write_text("precious")
        for output in (taken, tmp_path / "no-folder" / "a.join"):
            assert fsllm("site", "invite", "a", "-o", output).exit_code == Exit.CONFIGURATION
        assert taken.read_text() == "precious"
        assert "a" not in standings()

    def test_a_name_that_is_none(self, tmp_path: Path) -> None:
        result = fsllm("site", "invite", "Hospital A", "-o", tmp_path / "a.join")
        assert (result.exit_code, (tmp_path / "a.join").exists()) == (Exit.USAGE, False)

    def test_revoking_asks(self, server: ServerProcess) -> None:
        server.enroll("a")
        assert fsllm("site", "revoke", "a", stdin="n\n").exit_code == 1
        assert standings()["a"] == "enrolled"
        assert fsllm("site", "revoke", "a", stdin="y\n").exit_code == 0
        assert standings()["a"] == "revoked"

    def test_revoking_without_a_question(self, server: ServerProcess) -> None:
        server.enroll("a")
        told = json.loads(fsllm("site", "revoke", "a", "--yes", "--json").stdout)
        assert (told["name"], told["standing"]) == ("a", "revoked")

    def test_nobody_to_revoke(self) -> None:
        result = fsllm("site", "revoke", "nobody", "--yes")
        assert result.exit_code == Exit.REFUSED
        assert "[MEMBER_UNKNOWN]" in result.stderr

    def test_the_list_is_a_table(self) -> None:
        assert "local-operator  operator  enrolled" in fsllm("site", "list").stdout


class TestOperators:
    """Logins, and which credential is used."""

    def login(self, server: ServerProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """Make alice an operator of another host, which has no server."""
        join = tmp_path / "alice.join"
        assert fsllm("operator", "invite", "alice", "-o", join, "--host", "localhost").exit_code == 0
        monkeypatch.setenv("FSLLM_STATE_DIR", str(tmp_path / "nothing"))
        assert fsllm("run", "list").exit_code == Exit.IDENTITY
        assert fsllm("login", "--join", join).exit_code == 0
        return join

    def test_login(self, server: ServerProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        join = self.login(server, tmp_path, monkeypatch)
        folder = tmp_path / "config" / "fsllm" / "operator"
        assert {path.name for path in folder.iterdir()} == {"credential.pem", "server.json"}
        assert (folder / "credential.pem").stat().st_mode & 0o777 == 0o600
        assert standings()["alice"] == "enrolled"
        again = fsllm("login", "--join", join, "--folder", tmp_path / "elsewhere")
        assert again.exit_code == Exit.IDENTITY
        assert "[JOIN_TOKEN_USED]" in again.stderr

    def test_an_answer_that_was_lost(
        self, server: ServerProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The key is kept before the token is spent: the same command gets the same certificate."""
        join = tmp_path / "alice.join"
        fsllm("operator", "invite", "alice", "-o", join, "--host", "localhost")
        folder = tmp_path / "login"
        with monkeypatch.context() as broken:
            broken.setattr("fsllm_operator.login.accept_chain", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            assert fsllm("login", "--join", join, "--folder", folder).exit_code == 130
        assert fsllm("login", "--join", join, "--folder", folder).exit_code == 0
        assert not (folder / "pending-key.pem").exists()

    @pytest.mark.usefixtures("server")
    def test_a_sites_join_file_is_not_an_operators(self, tmp_path: Path) -> None:
        fsllm("site", "invite", "a", "-o", tmp_path / "a.join")
        result = fsllm("login", "--join", tmp_path / "a.join")
        assert result.exit_code == Exit.IDENTITY
        assert "for the site 'a', not for an operator" in result.stderr

    def test_a_login_is_renewed_on_use(
        self, server: ServerProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.login(server, tmp_path, monkeypatch)
        folder = tmp_path / "config" / "fsllm" / "operator"
        before = load_credential(folder)
        assert fsllm("run", "list").exit_code == 0
        assert load_credential(folder) == before
        # A certificate of the same authority, past two thirds of its life: issued with 5 minutes of tolerance behind it.
        authority = CertificateAuthority.load(server.state / "authority")
        key = make_key()
        old = authority.issue(make_request(key), Member("fsllm", Role.OPERATOR, "alice"), timedelta(seconds=100))
        save_credential(folder, accept_chain(key, old, authority.pem))
        assert fsllm("run", "list").exit_code == 0
        renewed = load_credential(folder)
        assert renewed.key != key
        assert renewed.certificate.not_after > load_credential(
            server.state / "operator"
        ).certificate.not_before + timedelta(hours=20)

    def test_a_site_is_no_operator(self, server: ServerProcess, tmp_path: Path) -> None:
        save_credential(tmp_path / "site", server.enroll("a"))
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

    def test_all_is_well(self, server: ServerProcess) -> None:
        server.enroll("a")
        result = fsllm("doctor", "--json")
        assert result.exit_code == 0
        found = {check["name"]: check for check in json.loads(result.stdout)}
        assert {name: check["outcome"] for name, check in found.items() if check["outcome"] != "ok"} == {
            "members": "warning"
        }
        assert "away: a" in found["members"]["message"]
        assert found["key exchange"]["message"].startswith("X25519")
        assert "fsllm-client doctor" in fsllm("doctor").stdout

    def test_a_server_that_is_down(self, server: ServerProcess) -> None:
        server.kill()
        result = fsllm("doctor", "--json")
        assert result.exit_code == Exit.UNAVAILABLE
        assert [check["outcome"] for check in json.loads(result.stdout)] == ["ok", "failed"]
        assert fsllm("run", "list").exit_code == Exit.UNAVAILABLE

    def test_a_server_that_was_stopped(self, server: ServerProcess) -> None:
        assert server.stop() == 0
        result = fsllm("run", "list")
        assert result.exit_code == Exit.UNAVAILABLE
        assert f"The server that keeps its state in {server.state} is not running" in result.stderr


@pytest.mark.usefixtures("server")
class TestRuns:
    """Submitting and steering."""

    def test_submit_list_show(self, noop: Path) -> None:
        submitted = json.loads(fsllm("run", "submit", noop, "--json").stdout)
        assert (submitted["name"], submitted["status"]) == ("bench", "running")
        (listed,) = json.loads(fsllm("run", "list", "--json").stdout)
        assert listed["run_id"] == submitted["run_id"]
        shown = json.loads(fsllm("run", "show", "bench", "--json").stdout)
        assert shown["plan"]["algorithm"]["synthetic"] == {"mebibytes": 2.5, "tensors": 3}
        assert "bench" in fsllm("run", "list").stdout
        assert "round 0 of 2" in fsllm("run", "show", submitted["run_id"][:6]).stdout

    def test_a_bad_plan_is_not_sent(self, tmp_path: Path) -> None:
        (tmp_path / "bad.yaml").write_text("name: x\nmodel: {name: embedded}\nround: 3\n")
        result = fsllm("run", "submit", tmp_path / "bad.yaml")
        assert result.exit_code == Exit.CONFIGURATION
        assert "round: unknown key; did you mean 'rounds'?" in result.stderr
        assert json.loads(fsllm("run", "list", "--json").stdout) == []

    def test_pause_resume_cancel(self, noop: Path) -> None:
        fsllm("run", "submit", noop)
        assert "is paused" in fsllm("run", "pause", "bench").stdout
        assert json.loads(fsllm("run", "resume", "bench", "--json").stdout)["status"] == "running"
        again = fsllm("run", "resume", "bench")
        assert (again.exit_code, "[RUN_NOT_PAUSED]" in again.stderr) == (Exit.REFUSED, True)
        assert fsllm("run", "cancel", "bench", stdin="n\n").exit_code == 1
        assert fsllm("run", "cancel", "bench", "--yes").exit_code == 0
        ended = fsllm("run", "cancel", "bench", "--yes")
        assert (ended.exit_code, "[RUN_ENDED]" in ended.stderr) == (Exit.REFUSED, True)

    def test_watching_ends_with_a_pause_and_with_the_end(self, noop: Path) -> None:
        fsllm("run", "submit", noop)
        fsllm("run", "pause", "bench")
        paused = fsllm("run", "watch", "bench")
        assert (paused.exit_code, "[RUN_PAUSED]" in paused.stderr) == (Exit.RUN_FAILED, True)
        fsllm("run", "resume", "bench")
        fsllm("run", "cancel", "bench", "--yes")
        # The pause lies in the log still; it is no reason to stop now.
        result = fsllm("run", "watch", "bench", "--json")
        assert (result.exit_code, "[RUN_CANCELLED]" in result.stderr) == (Exit.RUN_FAILED, True)
        events = [json.loads(row) for row in result.stdout.splitlines()]
        assert [e["subject"] for e in events if e["kind"] == "status"] == ["running", "paused", "running", "cancelled"]

    @pytest.mark.parametrize("command", ["show", "watch", "pause", "resume"])
    def test_no_such_run(self, command: str) -> None:
        result = fsllm("run", command, "nothing")
        assert (result.exit_code, "[RUN_UNKNOWN]" in result.stderr) == (Exit.REFUSED, True)


def watching(run: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [str(Path(sysconfig.get_path("scripts")) / "fsllm"), "run", "watch", run, "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_watching_goes_on_across_a_restart(server: ServerProcess, noop: Path) -> None:
    fsllm("run", "submit", noop)
    watcher = watching("bench")
    assert watcher.stdout is not None
    assert json.loads(watcher.stdout.readline())["kind"] == "status"
    server.kill()
    server.restart()
    fsllm("run", "cancel", "bench", "--yes")
    out, err = watcher.communicate(timeout=60)
    assert watcher.returncode == Exit.RUN_FAILED
    assert "waiting for it" in err
    sequences = [json.loads(row)["sequence"] for row in out.splitlines()]
    assert sequences == sorted(set(sequences))
    assert json.loads(out.splitlines()[-1])["subject"] == "cancelled"


@pytest.mark.slow
def test_ctrl_c_leaves_the_run_alone(server: ServerProcess, noop: Path) -> None:
    fsllm("run", "submit", noop)
    watcher = watching("bench")
    assert watcher.stdout is not None
    watcher.stdout.readline()
    watcher.send_signal(signal.SIGINT)
    _, err = watcher.communicate(timeout=30)
    assert watcher.returncode == 130
    assert "The run goes on" in err
    assert "Traceback" not in err
    assert json.loads(fsllm("run", "show", "bench", "--json").stdout)["status"] == "running"


@pytest.mark.slow
def test_a_run_of_two_daemons_and_its_export(server: ServerProcess, noop: Path, tmp_path: Path) -> None:
    """The noop rule has a closed form: what is exported is what the rounds must have made."""
    from safetensors.numpy import load_file

    (tmp_path / "data.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    daemons = []
    try:
        for name in ("a", "b"):
            join = tmp_path / f"{name}.join"
            assert fsllm("site", "invite", name, "-o", join, "--host", "localhost").exit_code == 0
            daemons.append(
                subprocess.Popen(
                    [
                        *(sys.executable, "-m", "fsllm_client", "--server", server.address),
                        *("--data", str(tmp_path / "data.jsonl"), "--join", str(join)),
                    ],
                    env={**os.environ, "FSLLM_STATE_DIR": str(tmp_path / name)},
                    stderr=(tmp_path / f"{name}.log").open("wb"),
                )
            )
        submitted = fsllm("run", "submit", noop, "--watch")
        assert submitted.exit_code == 0, submitted.output
        assert "Run bench is done: 2 rounds." in submitted.stdout
        assert json.loads(fsllm("site", "list", "--json").stdout)[0]["attached"]
    finally:
        for daemon in daemons:
            daemon.terminate()
        for daemon in daemons:
            daemon.wait(30)
    shown = json.loads(fsllm("run", "show", "bench", "--json").stdout)
    assert [commit["round"] for commit in shown["commits"]] == [0, 1, 2]
    assert [c["member"] for c in shown["commits"][2]["contributions"]] == ["a", "b"]
    out = tmp_path / "adapter"
    exported = json.loads(fsllm("run", "export", "bench", "-o", out, "--json").stdout)
    assert (exported["version"], exported["tensors"]) == (2, 3)
    assert exported["digest"] == shown["commits"][2]["digest"]
    versions = {}
    for number in (0, 1, 2):
        fsllm("run", "export", "bench", "-o", tmp_path / str(number), "--version", str(number))
        versions[number] = load_file(tmp_path / str(number) / "adapter_model.safetensors")
    latest = load_file(out / "adapter_model.safetensors")
    assert sum(array.size for array in latest.values()) == exported["parameters"] == int(2.5 * 2**20 / 4)
    for name, array in latest.items():
        assert (array == versions[2][name]).all()
        assert (versions[1][name] != versions[0][name]).any()
