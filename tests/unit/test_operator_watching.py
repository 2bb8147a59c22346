"""A run as the operator sees it: events in, state, tables and lines out."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from fsllm.v1.control_pb2 import (
    RUN_STATUS_RUNNING,
    Commit,
    Contribution,
    MemberMetrics,
    Run,
    RunMember,
    WatchRunResponse,
)
from fsllm.v1.federation_pb2 import Metric, Progress, Version
from fsllm_operator.as_json import event_object, run_object
from fsllm_operator.display import run_display
from fsllm_operator.rounds import columns, mean, number, size, summarise
from fsllm_operator.watch import Lines
from fsllm_operator.watching import Watched, line


def commit(round_: int = 1) -> Commit:
    return Commit(
        round=round_,
        version=Version(number=round_, digest=b"\x01" * 32, payload_bytes=10),
        contributions=[
            Contribution(
                member="b",
                payload_bytes=300,
                examples=30,
                tokens=900,
                weight=0.75,
                metrics=[Metric(name="train_loss", value=2.0, weight=30)],
            ),
            Contribution(
                member="a",
                payload_bytes=200,
                examples=10,
                tokens=100,
                weight=0.25,
                metrics=[Metric(name="train_loss", value=4.0, weight=10)],
            ),
        ],
        metrics=[
            MemberMetrics(
                member="a",
                role="site",
                metrics=[Metric(name="loss", value=1.0, weight=10), Metric(name="perplexity", value=2.72, weight=10)],
            ),
            MemberMetrics(
                member="b",
                role="site",
                metrics=[Metric(name="loss", value=3.0, weight=30), Metric(name="perplexity", value=20.1, weight=30)],
            ),
            MemberMetrics(member="judge", role="evaluator", metrics=[Metric(name="exact_match", value=0.5, weight=8)]),
        ],
        phase_seconds={"collect": 2.0, "reduce": 0.5},
    )


def run() -> Run:
    return Run(
        run_id="abc123",
        name="x",
        status=RUN_STATUS_RUNNING,
        phase="collect",
        round=1,
        rounds=3,
        members=[
            RunMember(name="a", role="site", attached=True, standing="ready", epsilon=1.5, has_epsilon=True),
            RunMember(name="judge", role="evaluator", attached=False, standing="ready"),
        ],
    )


class TestRounds:
    """What a commit comes down to."""

    def test_sums_and_weighted_means(self) -> None:
        found = summarise(commit())
        assert found.contributors == ("a", "b")
        assert (found.examples, found.tokens, found.payload_bytes, found.seconds) == (40, 1000, 500, 2.5)
        assert found.train_loss == pytest.approx(0.75 * 2.0 + 0.25 * 4.0)
        assert found.metrics["validation", "loss"] == pytest.approx((10 * 1.0 + 30 * 3.0) / 40)
        assert found.metrics["held-out", "exact_match"] == 0.5

    def test_perplexity_is_that_of_the_mean_loss(self) -> None:
        assert summarise(commit()).metrics["validation", "perplexity"] == pytest.approx(math.exp(2.5))

    def test_a_round_without_anything(self) -> None:
        found = summarise(Commit(round=0))
        assert (found.contributors, found.train_loss, found.metrics) == ((), None, {})

    def test_columns_begin_with_the_held_out_file(self) -> None:
        assert columns([summarise(commit())]) == [
            ("held-out", "exact_match"),
            ("validation", "loss"),
            ("validation", "perplexity"),
        ]

    @given(st.lists(st.tuples(st.floats(-1e6, 1e6), st.floats(0, 1e6)), min_size=1))
    def test_a_mean_lies_between_the_values(self, pairs: list[tuple[float, float]]) -> None:
        found = mean([Metric(name="loss", value=value, weight=weight) for value, weight in pairs], "loss")
        assert found is not None
        values = [value for value, _ in pairs]
        slack = 1e-9 * max(1.0, *map(abs, values))
        assert min(values) - slack <= found <= max(values) + slack

    @pytest.mark.parametrize(
        ("value", "text"), [(None, "-"), (0.5, "0.5000"), (123456.0, "1.23e+05"), (math.inf, "inf"), (math.nan, "nan")]
    )
    def test_numbers(self, value: float | None, text: str) -> None:
        assert number(value) == text

    @pytest.mark.parametrize(
        ("value", "text"),
        [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (5 * 2**20, "5.0 MiB"), (2**50, "1024.0 TiB")],
    )
    def test_sizes(self, value: int, text: str) -> None:
        assert size(value) == text


class TestWatched:
    """The state that events build."""

    def test_begins_with_what_the_server_says(self) -> None:
        watched = Watched.of(run())
        assert (watched.status, watched.phase, watched.round, watched.rounds) == ("running", "collect", 1, 3)
        assert watched.members["a"].epsilon == 1.5
        assert watched.members["judge"].standing == "ready, away"

    def test_progress_of_a_member(self) -> None:
        watched = Watched.of(run())
        progress = Progress(activity="training", done=3, total=30, metrics=[Metric(name="loss", value=2.5)])
        assert watched.apply(WatchRunResponse(kind="progress", subject="a", progress=progress))
        member = watched.members["a"]
        assert (member.activity, member.done, member.total, member.loss) == ("training", 3, 30, 2.5)

    def test_an_evaluation_does_not_pass_for_training_loss(self) -> None:
        watched = Watched.of(run())
        progress = Progress(activity="evaluating", done=1, total=2, metrics=[Metric(name="loss", value=9.0)])
        watched.apply(WatchRunResponse(kind="progress", subject="a", progress=progress))
        assert watched.members["a"].loss is None

    def test_a_recorded_event_counts_once(self) -> None:
        """After a reconnect the server may send again what we have."""
        watched = Watched.of(run())
        event = WatchRunResponse(sequence=7, round=1, kind="commit", subject="1", commit=commit())
        assert watched.apply(event)
        assert not watched.apply(event)
        assert watched.members["b"].sent_bytes == 300
        # The same round in a fresh answer of the server is no second one either.
        again = run()
        again.commits.append(commit())
        watched.refresh(again)
        assert watched.members["b"].sent_bytes == 300

    def test_a_new_collect_clears_the_bars(self) -> None:
        watched = Watched.of(run())
        watched.apply(
            WatchRunResponse(sequence=1, kind="update", subject="a", metrics=[Metric(name="epsilon", value=2)])
        )
        assert (watched.members["a"].activity, watched.members["a"].epsilon) == ("delivered", 2.0)
        watched.apply(WatchRunResponse(sequence=2, round=2, kind="phase", subject="collect", message="waiting"))
        assert (watched.members["a"].activity, watched.round, watched.message) == ("", 2, "waiting")

    def test_a_restart_of_the_server_is_no_status(self) -> None:
        watched = Watched.of(run())
        watched.apply(
            WatchRunResponse(sequence=1, kind="status", subject="restarted", message="the server has restarted")
        )
        assert watched.status == "running"
        watched.apply(WatchRunResponse(sequence=2, kind="status", subject="paused", message="no quorum"))
        assert (watched.status, watched.message) == ("paused", "no quorum")

    def test_a_kind_of_a_newer_server_changes_nothing(self) -> None:
        watched = Watched.of(run())
        before = (watched.status, watched.phase, dict(watched.members))
        assert watched.apply(WatchRunResponse(sequence=1, round=1, kind="moonrise", subject="full"))
        assert (watched.status, watched.phase, watched.members) == before


def shown(watched: Watched) -> str:
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    with console.file:
        console.print(run_display(watched, all_rounds=True))
    return console.export_text()


class TestDisplay:
    """What stands on the terminal."""

    def test_everything_is_there(self) -> None:
        watched = Watched.of(run())
        watched.apply(WatchRunResponse(sequence=1, round=1, kind="commit", subject="1", commit=commit()))
        progress = Progress(activity="uploading", done=2**20, total=2**21)
        watched.apply(WatchRunResponse(kind="progress", subject="a", progress=progress))
        text = shown(watched)
        for words in (
            "x abc123",
            "running",
            "round 1 of 3",
            "judge (evaluator)",
            "uploading 1.0 MiB of 2.0 MiB",
            "1.50",
        ):
            assert words in text
        row = next(row for row in text.splitlines() if row.strip().startswith("1 ") and "500 B" in row)
        assert row.split() == ["1", "2", "40", "500", "B", "2.5", "2.5000", "0.5000", "2.5000", "12.1825"]

    def test_no_epsilon_column_without_noise(self) -> None:
        plain = run()
        plain.members[0].has_epsilon = False
        assert "ε" not in shown(Watched.of(plain))


class TestLines:
    """Plain lines, for logs and pipes."""

    def test_a_line_of_each_kind(self) -> None:
        event = WatchRunResponse(sequence=1, round=2, kind="commit", subject="2", commit=commit(2))
        assert "round 2 commit 2 2 updates, 500 B, 2.5 s, training loss 2.5000, held-out exact_match 0.5000" in line(
            event
        )
        event = WatchRunResponse(round=1, kind="member", subject="a", message="a has joined")
        assert line(event).endswith("round 1 member a - a has joined")

    def test_progress_is_told_now_and_then(self) -> None:
        now = 0.0
        written: list[str] = []
        lines = Lines(written.append, lambda: now)

        def step(done: int, activity: str = "training") -> None:
            progress = Progress(activity=activity, done=done, total=30)
            lines.show(WatchRunResponse(round=1, kind="progress", subject="a", progress=progress))

        step(1)
        step(2)
        now = 11.0
        step(3)
        step(4)
        step(30)
        step(1, "uploading")
        assert [text.split()[-1] for text in written] == ["1/30", "3/30", "30/30", "1/30"]

    def test_other_events_are_all_told(self) -> None:
        written: list[str] = []
        lines = Lines(written.append)
        for _ in range(3):
            lines.show(WatchRunResponse(round=1, kind="member", subject="a", message="a is attached"))
        assert len(written) == 3


class TestJson:
    """The stable form for programs."""

    def test_a_run(self) -> None:
        told = run()
        told.plan = b'{"name":"x"}'
        told.commits.append(commit())
        found = run_object(told)
        assert (found["status"], found["plan"], found["created"]) == ("running", {"name": "x"}, None)
        assert [m["epsilon"] for m in found["members"]] == [1.5, None]
        assert found["commits"][0]["digest"] == "01" * 32
        assert found["commits"][0]["phase_seconds"] == {"collect": 2.0, "reduce": 0.5}

    def test_an_event(self) -> None:
        found = event_object(
            WatchRunResponse(sequence=3, kind="progress", progress=Progress(activity="queued", done=1))
        )
        assert (found["sequence"], found["progress"]["activity"], "commit" in found) == (3, "queued", False)
