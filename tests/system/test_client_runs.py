"""Real daemons against a real server: whole runs with an exact result, through kills, restarts and renewals."""

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from uuid import uuid4

import grpc
import numpy as np
import pytest
from tests.system.harness import CALL_SECONDS, ServerProcess
from tests.system.runs import await_done, events, expected, final, plan_for, submit
from tests.system.site_process import SiteProcess, join_file

from fsllm.v1 import control_pb2 as control
from fsllm_common.identity.authority import CertificateAuthority
from fsllm_common.identity.keys import Credential, load_credential, make_key, make_request, save_credential

pytestmark = pytest.mark.slow

LEAST_MEMORY = 80 * 2**20


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n')
    return path


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with ServerProcess(tmp_path_factory.mktemp("fsllm") / "server") as server:
        yield server


Start = Callable[..., SiteProcess]


@pytest.fixture
def start(server: ServerProcess, tmp_path: Path, data: Path) -> Iterator[Start]:
    """Start daemons of the module's server; they are ended with the test."""
    running: list[SiteProcess] = []

    def make(*arguments: str, of: ServerProcess = server, policy: str = "", rows: Path = data) -> SiteProcess:
        state = tmp_path / f"site-{uuid4().hex[:6]}"
        state.mkdir()
        if policy:
            (state / "policy.toml").write_text(policy)
        site = SiteProcess(of, state, rows, *arguments)
        running.append(site)
        site.__enter__()
        return site

    yield make
    for site in running:
        site.__exit__(None, None, None)


def test_two_daemons_give_exactly_the_closed_form_and_idle_small(server: ServerProcess, start: Start) -> None:
    sites = (start("--metrics-port", "0"), start())
    for site in sites:
        site.await_log("attached")
        assert site.memory() <= LEAST_MEMORY
        maps = Path(f"/proc/{site.process.pid}/maps").read_text()
        assert not any(name in maps for name in ("torch", "numpy", "sqlalchemy", "rich"))
    run = submit(server, plan_for(*sites))
    done = await_done(server, run)
    assert [commit.round for commit in done.commits] == [0, 1, 2, 3]
    np.testing.assert_allclose(final(server, run), expected(sites, 3), rtol=0, atol=2e-6)
    for site in sites:
        assert not list((site.state / "outbox").iterdir())
        assert site.stop() == 0


def test_a_daemon_killed_in_the_middle_comes_back_and_the_result_is_exact(server: ServerProcess, start: Start) -> None:
    sites = (start(), start())
    run = submit(server, plan_for(*sites, rounds=12))
    for round_ in (2, 5, 8):
        next(e for e in events(server, run) if e.kind == "commit" and e.round == round_)
        sites[0].kill()
        sites[0].start()
    await_done(server, run)
    np.testing.assert_allclose(final(server, run), expected(sites, 12), rtol=0, atol=1e-5)


def test_daemons_live_through_a_server_that_is_killed(tmp_path: Path, start: Start) -> None:
    with ServerProcess(tmp_path / "server") as server:
        sites = (start(of=server), start(of=server))
        run = submit(server, plan_for(*sites, rounds=8))
        next(e for e in events(server, run) if e.kind == "commit" and e.round == 2)
        pids = [site.process.pid for site in sites]
        server.kill()
        for site in sites:
            site.await_log("not attached; trying again")
        server.restart()
        await_done(server, run)
        np.testing.assert_allclose(final(server, run), expected(sites, 8), rtol=0, atol=1e-5)
        assert [site.process.pid for site in sites] == pids


def test_a_certificate_is_renewed_without_a_restart(tmp_path: Path, start: Start) -> None:
    # 72 seconds, backdated by five minutes: due for renewal from the first second.
    with ServerProcess(tmp_path / "server", "--certificate-hours", "0.02") as server:
        sites = (start(of=server), start(of=server))
        before = {site.name: site for site in sites}
        for site in before.values():
            site.await_log("certificate renewed")
            site.await_log("attached", times=2)
        run = submit(server, plan_for(*sites))
        await_done(server, run)
        np.testing.assert_allclose(final(server, run), expected(sites, 3), rtol=0, atol=2e-6)


def test_a_revoked_site_ends_and_says_why(server: ServerProcess, start: Start) -> None:
    site = start()
    site.await_log("attached")
    server.control().RevokeMember(control.RevokeMemberRequest(name=site.name), timeout=CALL_SECONDS)
    assert site.wait() == 6
    assert "MEMBER_REVOKED" in site.log
    site.start()
    assert site.wait() == 6
    # A new invitation under the same name heals it, with nothing deleted at the site.
    site.start("--join", str(join_file(server, site.name, site.state.with_name("again.join"))))
    site.await_log("attached", times=2)


def test_a_second_daemon_of_the_same_site(server: ServerProcess, start: Start, tmp_path: Path, data: Path) -> None:
    site = start()
    site.await_log("attached")
    locked = subprocess.run(
        [
            *(sys.executable, "-c", "from fsllm_client.cli import main; main()", "--server", server.address),
            *("--data", str(data), "--state-dir", str(site.state)),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert locked.returncode == 9
    assert f"is used by process {site.process.pid}" in locked.stderr
    copy = tmp_path / "copy"
    copy.mkdir()
    shutil.copytree(site.state / "identity", copy / "identity")
    other = SiteProcess(server, copy, data)
    other.start()
    try:
        other.await_log("attached")
        assert site.wait() == 6
        assert "ATTACHED_ELSEWHERE" in site.log
    finally:
        other.stop()


def test_a_join_file_given_again_is_no_obstacle(server: ServerProcess, start: Start) -> None:
    site = start()
    site.await_log("attached")
    assert site.stop() == 0
    site.start("--join", str(site.state.with_name(f"{site.name}.join")))
    site.await_log("already enrolled: the join file is spent and may be deleted")
    site.await_log("attached", times=2)


def refused(server: ServerProcess, state: Path, data: Path, credential: Credential) -> str:
    """Start a daemon with a credential that must not do, and return what it says; it ends with the exit code 6."""
    save_credential(state / "identity", credential)
    site = SiteProcess(server, state, data)
    site.start()
    assert site.wait() == 6
    assert "Traceback" not in site.log
    return site.log


def test_an_expired_certificate_is_named_as_the_cause(server: ServerProcess, tmp_path: Path, data: Path) -> None:
    good = server.enroll("late")
    authority = CertificateAuthority.load(server.state / "authority")
    key = make_key()
    chain = authority.issue(make_request(key), good.member, timedelta(minutes=-1))
    told = refused(server, tmp_path / "late", data, Credential(key, chain, good.authority))
    assert "CERTIFICATE_EXPIRED" in told
    assert "spiffe://fsllm/site/late expired at" in told
    assert "--join FILE" in told


def test_a_server_of_another_federation_is_named_as_the_cause(
    server: ServerProcess, tmp_path: Path, data: Path
) -> None:
    with ServerProcess(tmp_path / "server") as other:
        told = refused(server, tmp_path / "site", data, other.enroll("stranger"))
    assert "CERTIFICATE_UNTRUSTED" in told
    assert f"The certificate of {server.address} is not from this federation's CA" in told


def test_a_certificate_of_another_authority_is_named_as_the_cause(
    server: ServerProcess, tmp_path: Path, data: Path
) -> None:
    with ServerProcess(tmp_path / "server") as other:
        stranger = other.enroll("stranger")
    # It trusts our server, but the server can not trust it.
    mixed = Credential(stranger.key, stranger.chain, server.operator().authority)
    assert "CERTIFICATE_UNTRUSTED" in refused(server, tmp_path / "site", data, mixed)


def test_a_run_that_the_policy_refuses_is_declined_with_the_line(server: ServerProcess, start: Start) -> None:
    strict, free = start(policy="[accept]\nmaximum_rounds = 2\n"), start()
    for site in (strict, free):
        site.await_log("attached")
    plan = plan_for(strict, free, cohort={"quorum": 1, "sites": sorted((strict.name, free.name))})
    run = submit(server, plan)
    found = await_done(server, run)
    (member,) = [member for member in found.members if member.name == strict.name]
    assert member.standing == "declined"
    assert "policy.toml line 2: accept.maximum_rounds = 2; the plan has rounds = 3" in member.message
    np.testing.assert_allclose(final(server, run), expected((free,), 3), rtol=0, atol=2e-6)


def test_a_run_waits_for_a_person_and_begins_when_accepted(server: ServerProcess, start: Start) -> None:
    site = start(policy="[accept]\nautomatic = false\n")
    plan = plan_for(site)
    run = submit(server, plan)
    site.await_log("this run waits for a person: `fsllm-client accept RUN`")
    accept = [sys.executable, "-c", "from fsllm_client.cli import main; main()", "accept", str(plan["name"])]
    subprocess.run([*accept, "--state-dir", str(site.state)], check=True, timeout=60)
    await_done(server, run)
    np.testing.assert_allclose(final(server, run), expected((site,), 3), rtol=0, atol=2e-6)


def test_the_policy_is_read_again_on_sighup(server: ServerProcess, start: Start) -> None:
    site = start()
    site.await_log("attached")
    (site.state / "policy.toml").write_text('[accept]\nalgorithms = ["fedavg"]\n')
    site.process.send_signal(signal.SIGHUP)
    site.await_log("policy read again")
    run = submit(server, plan_for(site))
    declined = next(e for e in events(server, run) if e.kind == "member" and "algorithms" in e.message)
    assert "the plan has algorithm.name = noop" in declined.message


def test_broken_data_is_declined_with_its_file_and_line_and_without_its_content(
    server: ServerProcess, start: Start, tmp_path: Path, tiny_model: Path
) -> None:
    rows = tmp_path / "rows"
    rows.mkdir()
    (rows / "ward.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "secret patient\n')
    site = start(policy=f'[models]\ntiny = "{tiny_model}"\n', rows=rows)
    run = submit(server, plan_for(site, model={"name": "tiny"}, algorithm={"name": "fedavg"}))
    told = next(e for e in events(server, run) if e.kind == "member" and "ward.jsonl" in e.message)
    assert "ward.jsonl, line 2" in told.message
    assert "secret" not in told.message + site.log
    # The daemon lives, and serves the next run.
    noop = submit(server, plan_for(site))
    await_done(server, noop)


def test_the_doctor_finds_nothing_wrong_at_a_healthy_site(server: ServerProcess, start: Start, data: Path) -> None:
    site = start()
    site.await_log("attached")
    doctor = [sys.executable, "-c", "from fsllm_client.cli import main; main()", "doctor", "--json"]
    arguments = ("--server", server.address, "--data", str(data), "--state-dir", str(site.state))
    done = subprocess.run([*doctor, *arguments], capture_output=True, text=True, timeout=60, check=False)
    checks = {check["name"]: check for check in json.loads(done.stdout)}
    for name in ("state folder", "certificate", "server", "clock", "membership", "policy", "data"):
        assert checks[name]["outcome"] == "ok", checks[name]
    assert site.name in checks["certificate"]["message"]
    server.control().RevokeMember(control.RevokeMemberRequest(name=site.name), timeout=CALL_SECONDS)
    done = subprocess.run([*doctor, *arguments], capture_output=True, text=True, timeout=60, check=False)
    checks = {check["name"]: check for check in json.loads(done.stdout)}
    assert (checks["membership"]["outcome"], checks["membership"]["reason"]) == ("failed", "MEMBER_REVOKED")
    assert done.returncode == 6


def test_a_key_never_leaves_and_is_the_owners_alone(server: ServerProcess, start: Start) -> None:
    site = start()
    site.await_log("attached")
    credential = load_credential(site.state / "identity")
    assert credential.member.name == site.name
    for path in (site.state / "identity").iterdir():
        assert path.stat().st_mode & 0o077 == 0, path
    assert not list((site.state / "identity").glob("pending*"))
    assert isinstance(credential.member.role.value, str)
    with server.channel(credential) as channel:
        grpc.channel_ready_future(channel).result(timeout=CALL_SECONDS)
