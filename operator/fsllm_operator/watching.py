"""What an operator sees of a run: a state that grows with the events of WatchRun, whatever shows it."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC

from fsllm.v1.control_pb2 import Commit, Run, RunStatus, WatchRunResponse
from fsllm.v1.federation_pb2 import Metric, Progress
from fsllm_operator.rounds import Round, columns, number, size, summarise

STATUS_NAMES = {value: name.removeprefix("RUN_STATUS_").lower() for name, value in RunStatus.items()}


@dataclass(slots=True)
class Member:
    """The latest of one member."""

    name: str
    role: str = "site"
    standing: str = ""
    activity: str = ""
    done: int = 0
    total: int = 0
    loss: float | None = None
    tokens_per_second: float | None = None
    epsilon: float | None = None
    sent_bytes: int = 0
    message: str = ""
    """Why it declined or failed, when it last did."""


@dataclass(slots=True)
class Watched:
    """A run as far as its events tell. ``apply`` takes them in order; one seen before changes nothing."""

    run_id: str
    name: str
    status: str
    phase: str = ""
    round: int = 0
    rounds: int = 0
    message: str = ""
    members: dict[str, Member] = field(default_factory=dict)
    committed: dict[int, Round] = field(default_factory=dict)
    sequence: int = 0

    @classmethod
    def of(cls, run: Run) -> "Watched":
        """Return the state of a run as GetRun tells it."""
        watched = cls(run.run_id, run.name, STATUS_NAMES[run.status])
        watched.refresh(run)
        return watched

    def refresh(self, run: Run) -> None:
        """Take over what the server says now; it outranks what the events said before."""
        self.status, self.phase, self.message = STATUS_NAMES[run.status], run.phase, run.message
        self.round, self.rounds = run.round, run.rounds
        for told in run.members:
            member = self.members.setdefault(told.name, Member(told.name))
            member.role = told.role or member.role
            member.standing = told.standing if told.attached else f"{told.standing}, away"
            member.message = told.message
            if told.has_epsilon:
                member.epsilon = told.epsilon
        for commit in run.commits:
            self._commit(commit)

    def apply(self, event: WatchRunResponse) -> bool:
        """Take one event in. Returns False when it had been seen before."""
        if event.sequence:
            if event.sequence <= self.sequence:
                return False
            self.sequence = event.sequence
        if event.HasField("commit"):
            self._commit(event.commit)
        if event.HasField("progress"):
            self._progress(event.subject, event.progress)
            return True
        self.round = event.round or self.round
        match event.kind:
            case "phase":
                self.phase, self.message = event.subject, event.message
                if event.subject == "collect":
                    self._begin_round()
            case "status":
                # A restart of the server is told so too, and changes nothing.
                self.status = event.subject if event.subject in STATUS_NAMES.values() else self.status
                self.message = event.message
            case "failure":
                self.message = event.message
            case "member":
                self._member(event.subject).standing = event.message.removeprefix(f"{event.subject} ")
            case "update":
                member = self._member(event.subject)
                member.activity, member.done, member.total, member.message = "delivered", 1, 1, ""
                self._measure(member, event.metrics)
            case "rejected":
                self._member(event.subject).activity = "rejected"
            case "evaluation":
                member = self._member(event.subject)
                member.activity, member.done, member.total = "evaluated", 1, 1
        return True

    def _commit(self, commit: Commit) -> None:
        if commit.round not in self.committed:
            for contribution in commit.contributions:
                self._member(contribution.member).sent_bytes += contribution.payload_bytes
        self.committed[commit.round] = summarise(commit)

    def _begin_round(self) -> None:
        for member in self.members.values():
            member.activity, member.done, member.total = "", 0, 0

    def _progress(self, name: str, progress: Progress) -> None:
        member = self._member(name)
        member.activity, member.done, member.total = progress.activity, progress.done, progress.total
        if progress.activity == "training":
            self._measure(member, progress.metrics)

    def _member(self, name: str) -> Member:
        return self.members.setdefault(name, Member(name))

    @staticmethod
    def _measure(member: Member, metrics: Iterable[Metric]) -> None:
        for metric in metrics:
            match metric.name:
                case "loss" | "train_loss":
                    member.loss = metric.value
                case "tokens_per_second":
                    member.tokens_per_second = metric.value
                case "epsilon":
                    member.epsilon = metric.value


def line(event: WatchRunResponse) -> str:
    """Return an event as one line of text, for logs and pipes."""
    at = event.at.ToDatetime(tzinfo=UTC).astimezone().strftime("%H:%M:%S")
    words = [at, f"round {event.round}", event.kind]
    if event.subject:
        words.append(event.subject)
    if event.HasField("progress"):
        progress = event.progress
        words.append(f"{progress.activity} {progress.done}/{progress.total}")
        words += [f"{metric.name} {number(metric.value)}" for metric in progress.metrics]
    elif event.HasField("commit"):
        words.append(round_line(summarise(event.commit)))
    else:
        words += [f"{metric.name} {number(metric.value)}" for metric in event.metrics]
        if event.message:
            words.append(f"- {event.message}")
    return " ".join(words)


def round_line(committed: Round) -> str:
    """Return a committed round's numbers on one line."""
    parts = [f"{len(committed.contributors)} updates", size(committed.payload_bytes), f"{committed.seconds:.1f} s"]
    if committed.train_loss is not None:
        parts.append(f"training loss {number(committed.train_loss)}")
    parts += [f"{scope} {metric} {number(committed.metrics[scope, metric])}" for scope, metric in columns([committed])]
    return ", ".join(parts)
