"""A run on the terminal, with rich: a head line, the members with their progress, the committed rounds."""

from collections.abc import Iterable

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fsllm_operator.rounds import Round, columns, number, size
from fsllm_operator.watching import Member, Watched

_COLOURS = {"running": "cyan", "done": "green", "paused": "yellow", "cancelled": "red"}
_SHOWN_ROUNDS = 12


def run_display(watched: Watched, *, all_rounds: bool = False) -> RenderableType:
    """Return everything known of a run, fit for ``rich.live.Live``; only the last rounds unless ``all_rounds``."""
    parts: list[RenderableType] = [_head(watched)]
    if watched.message:
        parts.append(Text(watched.message, style="dim"))
    if watched.members:
        members = sorted(watched.members.values(), key=lambda m: (m.role, m.name))
        parts.append(_members(members))
        parts += [Text(f"{member.name}: {member.message}", style="yellow") for member in members if member.message]
    rounds = [watched.committed[n] for n in sorted(watched.committed)]
    if rounds:
        parts.append(rounds_table(rounds if all_rounds else rounds[-_SHOWN_ROUNDS:]))
    return Group(*parts)


def rounds_table(rounds: Iterable[Round]) -> Table:
    """Return the table of committed rounds: who sent how much in what time, and what was measured."""
    rounds = list(rounds)
    measured = columns(rounds)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("round", "updates", "examples", "bytes", "seconds", "training loss"):
        table.add_column(heading, justify="right")
    for scope, metric in measured:
        table.add_column(f"{scope} {metric.replace('_', ' ')}", justify="right")
    for row in rounds:
        table.add_row(
            str(row.number),
            str(len(row.contributors)),
            str(row.examples),
            size(row.payload_bytes),
            f"{row.seconds:.1f}",
            number(row.train_loss),
            *(number(row.metrics.get(key)) for key in measured),
        )
    return table


def _head(watched: Watched) -> Table:
    table = Table.grid(padding=(0, 2))
    text = Text()
    text.append(watched.name, style="bold")
    text.append(f" {watched.run_id}", style="dim")
    status = Text(watched.status, style=_COLOURS.get(watched.status, ""))
    where = f"round {watched.round} of {watched.rounds}" + (f", {watched.phase}" if watched.phase else "")
    bar = ProgressBar(total=max(1, watched.rounds), completed=max(0, max(watched.committed, default=0)), width=24)
    table.add_row(text, status, where, bar)
    return table


def _members(members: list[Member]) -> Table:
    private = any(member.epsilon is not None for member in members)
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("member")
    table.add_column("standing")
    table.add_column("doing")
    table.add_column("progress")
    for heading in ("loss", "tokens/s", "sent", *(("ε",) if private else ())):
        table.add_column(heading, justify="right")
    for member in members:
        epsilon = ("-" if member.epsilon is None else f"{member.epsilon:.2f}",) if private else ()
        table.add_row(
            member.name if member.role == "site" else f"{member.name} ({member.role})",
            member.standing,
            _activity(member),
            ProgressBar(total=member.total, completed=member.done, width=20) if member.total else "",
            number(member.loss),
            "-" if member.tokens_per_second is None else f"{member.tokens_per_second:.0f}",
            size(member.sent_bytes),
            *epsilon,
        )
    return table


def _activity(member: Member) -> str:
    if not member.total or member.activity in ("delivered", "evaluated"):
        return member.activity
    if member.activity in ("uploading", "downloading"):
        return f"{member.activity} {size(member.done)} of {size(member.total)}"
    return f"{member.activity} {member.done}/{member.total}"
