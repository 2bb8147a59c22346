"""What a daemon says about the work in hand: to the server, to its own metrics, and to a person at the terminal."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Protocol, Self

from fsllm.v1.federation_pb2 import Metric, Progress

if TYPE_CHECKING:
    from rich.progress import TaskID

EVERY_SECONDS: Final = 0.5
"""The contract's least time between two Progress messages of one activity."""

PROGRESS_METRICS: Final = frozenset({"tokens_per_second", "learning_rate"})
"""What may leave with progress besides the training loss, which the policy decides on."""


@dataclass(frozen=True, slots=True)
class Label:
    """Which work is meant, for people."""

    order_id: str
    run: str
    round: int
    what: str


class Display(Protocol):
    """Where a person sees progress."""

    def show(self, label: Label, activity: str, done: int, total: int, metrics: Mapping[str, float]) -> None:
        """Show how far an order is."""

    def end(self, label: Label) -> None:
        """The order has ended."""


class Silent:
    """Not at a terminal: the log says when orders begin and end, and that is enough."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def show(self, label: Label, activity: str, done: int, total: int, metrics: Mapping[str, float]) -> None:
        """Show nothing."""

    def end(self, label: Label) -> None:
        """Show nothing."""


class Terminal:
    """Bars on standard error, with the log scrolling above them."""

    def __enter__(self) -> Self:
        from rich.console import Console  # only at a terminal: a service needs no rich in its memory
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
        from rich.progress import Progress as Bars

        self._bars = Bars(
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            console=Console(stderr=True),
            transient=True,
        )
        self._tasks: dict[str, TaskID] = {}
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def show(self, label: Label, activity: str, done: int, total: int, metrics: Mapping[str, float]) -> None:
        """Draw or move the order's bar."""
        numbers = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        values: dict[str, Any] = {
            "description": f"{label.run} round {label.round} {activity}",
            "completed": done,
            "total": total or None,
            "numbers": numbers,
        }
        task = self._tasks.get(label.order_id)
        if task is None:
            self._tasks[label.order_id] = self._bars.add_task(**values)
        else:
            self._bars.update(task, **values)

    def end(self, label: Label) -> None:
        """Remove the order's bar."""
        if (task := self._tasks.pop(label.order_id, None)) is not None:
            self._bars.remove_task(task)


class Reporter:
    """Reports one order's progress, at most every half second for one activity."""

    def __init__(
        self,
        label: Label,
        send: Callable[[Progress], None],
        display: Display,
        *,
        loss_may_leave: bool,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.label = label
        self._send = send
        self._display = display
        self._loss = loss_may_leave
        self._clock = clock
        self._activity = ""
        self._last = 0.0

    def advance(self, activity: str, done: int, total: int, metrics: Mapping[str, float] | None = None) -> None:
        """Say how far the activity is. The first and the last of an activity are always sent."""
        now = self._clock()
        if activity == self._activity and done != total and now - self._last < EVERY_SECONDS:
            return
        self._activity, self._last = activity, now
        values = metrics or {}
        self._display.show(self.label, activity, done, total, values)
        leaving = [
            Metric(name=name, value=value)
            for name, value in values.items()
            if name in PROGRESS_METRICS or (name == "loss" and self._loss)
        ]
        self._send(Progress(order_id=self.label.order_id, activity=activity, done=done, total=total, metrics=leaving))

    def end(self) -> None:
        """The order has ended."""
        self._display.end(self.label)
