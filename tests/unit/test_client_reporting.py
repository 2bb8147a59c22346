"""Progress: often enough to live, seldom enough not to flood, and without what must stay."""

from collections.abc import Mapping

from fsllm.v1.federation_pb2 import Progress
from fsllm_client.reporting import Label, Reporter, Silent


class Recorded(Silent):
    def __init__(self) -> None:
        self.shown: list[Mapping[str, float]] = []

    def show(self, label: Label, activity: str, done: int, total: int, metrics: Mapping[str, float]) -> None:
        self.shown.append(metrics)


def reporter(sent: list[Progress], *, loss: bool = True, display: Silent | None = None) -> tuple[Reporter, list[float]]:
    now = [100.0]
    label = Label("o", "run", 1, "train")
    return Reporter(label, sent.append, display or Silent(), loss_may_leave=loss, clock=lambda: now[0]), now


def test_the_first_and_last_of_an_activity_and_one_each_half_second() -> None:
    sent: list[Progress] = []
    report, now = reporter(sent)
    for step in range(1, 101):
        now[0] += 0.1
        report.advance("training", step, 100)
    report.advance("uploading", 1, 100)
    report.advance("uploading", 2, 100)
    report.advance("uploading", 100, 100)
    training = [p.done for p in sent if p.activity == "training"]
    assert training[0] == 1
    assert training[-1] == 100
    assert 18 <= len(training) <= 22
    assert [p.done for p in sent if p.activity == "uploading"] == [1, 100]


def test_the_loss_is_shown_here_and_leaves_only_where_it_may() -> None:
    metrics = {"loss": 1.5, "tokens_per_second": 10.0, "row": 7.0}
    for may in (True, False):
        sent: list[Progress] = []
        display = Recorded()
        report, _ = reporter(sent, loss=may, display=display)
        report.advance("training", 1, 2, metrics)
        assert {metric.name for metric in sent[0].metrics} == {"tokens_per_second"} | ({"loss"} if may else set())
        assert display.shown == [metrics]
