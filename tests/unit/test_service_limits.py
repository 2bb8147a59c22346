"""What a member may do how often, how slowly, how much, and in which words."""

import resource
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fsllm.v1.federation_pb2 import Answer, AttachRequest, Declined, Hello, Metric, Progress, UploadBegin
from fsllm_common.errors import FsllmError, Refused, Unavailable
from fsllm_common.text import printable
from fsllm_server import open_files
from fsllm_server.service import pace
from fsllm_server.service.disk_quota import DiskQuota
from fsllm_server.service.enrollment import _address
from fsllm_server.service.guard import Call
from fsllm_server.service.pace import PaceLimits
from fsllm_server.service.rates import MAX_NAMES, CallRate, Rate
from fsllm_server.service.screening import MAX_SENTENCE, screen_attach, screen_begin

MIB = 1 << 20


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


# How often.


def test_a_bucket_holds_a_burst_and_fills_at_its_rate() -> None:
    clock = Clock()
    rate = Rate(2.0, burst=10, clock=clock)
    assert [rate.wait("a") for _ in range(10)] == [0.0] * 10
    assert rate.wait("a") == pytest.approx(0.5)
    assert rate.wait("b") == 0.0  # a name's own
    clock.now += 0.5
    assert rate.wait("a") == 0.0
    assert rate.wait("a", 4) == pytest.approx(2.0)
    clock.now += 1000
    assert [rate.wait("a") for _ in range(11)][-1] == pytest.approx(0.5)  # no more than the burst
    rate.charge("a", 3)
    assert rate.wait("a", 0) == pytest.approx(1.5)
    clock.now += 1.5
    assert rate.wait("a", 0) == 0.0
    assert Rate(1.0, burst=5, clock=clock).wait("a", 60) == 0.0  # what costs more than all there ever is takes it all


def test_names_are_forgotten_before_they_fill_memory() -> None:
    rate = Rate(1.0, burst=1, clock=Clock())
    for name in range(MAX_NAMES + 5):
        rate.charge(str(name))
    assert len(rate._filled) == MAX_NAMES
    assert rate.wait("0") == 0.0
    assert rate.wait(str(MAX_NAMES)) > 0


def test_calls_count_for_what_they_cost() -> None:
    def allowed(method: str, *, refused: bool = False) -> int:
        rate = CallRate(600, clock=Clock())
        count = 0
        with pytest.raises(Unavailable, match="--calls-per-minute") as error:  # noqa: PT012 - any of many
            while count < 601:
                rate.enter("a", f"/fsllm.v1.X/{method}")
                count += 1
                if refused:
                    rate.refused("a")
        assert error.value.reason == "QUOTA_EXCEEDED"
        assert error.value.retry_after is not None
        return count

    assert [allowed(method) for method in ("GetRun", "Upload", "Attach", "Renew")] == [600, 150, 60, 10]
    assert allowed("GetRun", refused=True) == 55


@pytest.mark.parametrize(
    ("peer", "counted"),
    [
        ("ipv4:10.1.2.3:4567", "10.1.2.3"),
        ("ipv6:%5B::ffff:10.1.2.3%5D:4567", "10.1.2.3"),
        ("ipv6:%5B2001:db8:1:2:3:4:5:6%5D:4567", "2001:db8:1:2::/64"),
        ("ipv6:[2001:db8:1:2:9::1]:4567", "2001:db8:1:2::/64"),
        ("ipv6:%5Bfe80::1%25eth0%5D:4567", "fe80::/64"),
        ("unix:/tmp/socket", "unix"),
        ("", ""),
    ],
)
def test_who_counts_as_one_newcomer(peer: str, counted: str) -> None:
    assert _address(peer) == counted


# How slowly.


class Loop:
    """Time that passes when told."""

    def __init__(self) -> None:
        self.now = 0.0
        self.alarm: tuple[float, Callable[[], None]] | None = None

    def time(self) -> float:
        return self.now

    def call_at(self, when: float, callback: Callable[[], None]) -> "Loop":
        self.alarm = when, callback
        return self

    def cancel(self) -> None:
        self.alarm = None

    def sleep(self, seconds: float) -> None:
        end = self.now + seconds
        while self.alarm is not None and self.alarm[0] <= end:
            self.now, callback = self.alarm
            self.alarm = None
            callback()
        self.now = end


class Ended(Call):
    """A call that is ended, without a task behind it."""

    def __init__(self) -> None:
        self.ended_by = None

    def end(self, error: FsllmError) -> None:
        assert self.ended_by is None
        self.ended_by = error


def ended_by(limits: PaceLimits, monkeypatch: pytest.MonkeyPatch, *passed: tuple[float, int]) -> str | None:
    """Let bytes pass, each time after some seconds, and return the reason with which the call was ended."""
    loop, call = Loop(), Ended()
    monkeypatch.setattr(pace, "asyncio", SimpleNamespace(get_running_loop=lambda: loop))
    with pace.Pace(limits, call) as watched:
        for seconds, size in passed:
            loop.sleep(seconds)
            watched.advanced(size)
            if call.ended_by is not None:
                assert call.ended_by.retry_after == 1.0
                return call.ended_by.reason
    assert loop.alarm is None
    return None


def test_the_pace_of_transfers(monkeypatch: pytest.MonkeyPatch) -> None:
    any_rate = PaceLimits(stall_seconds=60, bytes_per_second=0)
    assert ended_by(any_rate, monkeypatch, *[(59.9, 1)] * 100) is None  # slow, but never still
    assert ended_by(any_rate, monkeypatch, (59.9, 1), (60.1, 1)) == "SITE_IDLE"
    limits = PaceLimits(stall_seconds=60, bytes_per_second=1000)
    assert ended_by(limits, monkeypatch, (60.1, 1)) == "SITE_IDLE"
    assert ended_by(limits, monkeypatch, *[(10, 10_000)] * 100) is None
    assert ended_by(limits, monkeypatch, *[(10, 9_000)] * 100) is None  # slower, and through before the grace is used
    assert ended_by(limits, monkeypatch, *[(10, 9_000)] * 130) == "TOO_SLOW"
    # One chunk of 1 MiB every 59 seconds never stalls, and is 17,772 bytes a second.
    trickle = PaceLimits(stall_seconds=60, bytes_per_second=65536)
    assert ended_by(trickle, monkeypatch, (59, MIB), (59, MIB)) is None
    assert ended_by(trickle, monkeypatch, (59, MIB), (59, MIB), (59, MIB)) == "TOO_SLOW"
    assert ended_by(trickle, monkeypatch, (1, 100 * MIB), *[(59, MIB)] * 20) is None  # what came early counts


# How much.


def test_bytes_on_the_servers_disk(tmp_path: Path) -> None:
    def put(run: str, member: str, size: int) -> None:
        folder = tmp_path / run / "1" / member
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{run}-{size}").write_bytes(bytes(size))

    put("r1", "a", 300)
    put("r2", "a", 300)
    put("r1", "b", 900)
    quota = DiskQuota(tmp_path, 1000)
    quota.demand("a", 400)
    with pytest.raises(Unavailable, match=r"holds 600 bytes.* 401 more") as refused:
        quota.demand("a", 401)
    assert (refused.value.reason, refused.value.retry_after) == ("QUOTA_EXCEEDED", 60.0)
    quota.demand("c", 1000)
    # What was announced and did not come, or is gone, does not count for ever.
    quota.demand("a", 400)
    (tmp_path / "r1" / "1" / "a" / "r1-300").unlink()
    quota.demand("a", 700)


@pytest.mark.parametrize(
    ("soft", "hard", "possible", "raised"),
    [
        (1024, 20_000, 4096, 4096 + open_files.OWN),  # as far as it takes
        (1024, resource.RLIM_INFINITY, 4096, 4096 + open_files.OWN),
        (1024, 2048, 2048 - open_files.OWN, 2048),  # as far as it may be
        (65_536, 65_536, 4096, None),
    ],
)
def test_each_connection_is_an_open_file(
    monkeypatch: pytest.MonkeyPatch, soft: int, hard: int, possible: int, raised: int | None
) -> None:
    limits = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (soft, hard))
    monkeypatch.setattr(resource, "setrlimit", lambda _, limit: limits.append(limit))
    assert open_files.connections_possible(4096) == possible
    assert limits == ([] if raised is None else [(raised, hard)])


# In which words.


@given(st.text())
def test_text_is_made_printable_and_stays_readable(text: str) -> None:
    shown = printable(text)
    assert shown.isprintable()
    assert printable(shown) == shown
    if text.isprintable():
        assert shown == text
    assert printable(text, 3) == printable(text[:3])


def test_terminal_commands_are_seen_not_done() -> None:
    assert printable("a\x1b[2Jb\r\nc\u202ed\u2028e\x9b") == r"a\x1b[2Jb\r\nc\u202ed\u2028e\x9b"
    assert printable("Zürich 東京") == "Zürich 東京"


@pytest.mark.parametrize(
    "request_",
    [
        AttachRequest(hello=Hello(software_version="v" * 65)),
        AttachRequest(hello=Hello(held_orders=["x"] * 257)),
        AttachRequest(hello=Hello(held_orders=["x" * 201])),
        AttachRequest(hello=Hello(held_orders=["with space"])),
        AttachRequest(answer=Answer(order_id="ä")),
        AttachRequest(answer=Answer(order_id="o", declined=Declined(reason="lower case"))),
        AttachRequest(answer=Answer(order_id="o", declined=Declined(reason="R" * 65))),
        AttachRequest(answer=Answer(order_id="o", declined=Declined(reason="R", message="m" * 70_000))),
        AttachRequest(progress=Progress(order_id="o", activity="\t")),
        AttachRequest(progress=Progress(order_id="o", metrics=[Metric(name="a{b}")])),
        AttachRequest(progress=Progress(order_id="o", metrics=[Metric(name="loss", weight=float("inf"))])),
    ],
)
def test_words_that_are_refused(request_: AttachRequest) -> None:
    with pytest.raises(Refused) as refused:
        screen_attach(request_)
    assert refused.value.reason == "MESSAGE_INVALID"
    assert refused.value.message.isprintable()
    assert len(refused.value.message) < 200


def test_words_that_honest_daemons_say() -> None:
    run = "0123456789ab"
    for request in (
        AttachRequest(hello=Hello(protocol_version=1, software_version="0.1.0", held_orders=[f"{run}.1.train.a.6"])),
        AttachRequest(progress=Progress(order_id=f"{run}.1.train.a.6", activity="downloading", done=1, total=2)),
        AttachRequest(answer=Answer(order_id=f"{run}.0.join.a.1", accepted={})),
    ):
        before = AttachRequest.FromString(request.SerializeToString())
        screen_attach(request)
        assert request == before
    sentence = AttachRequest(answer=Answer(order_id="o", failed={"reason": "DATA_INVALID", "message": "line\n" * 900}))
    screen_attach(sentence)
    assert sentence.answer.failed.message == r"line\n" * (MAX_SENTENCE // 5)
    screen_begin(UploadBegin(order_id="o", run_id=run, metrics=[Metric(name="delta_norm", value=float("nan"))]))
    with pytest.raises(Refused, match="more than 64 metrics"):
        screen_begin(UploadBegin(metrics=[Metric(name="m")] * 65))
