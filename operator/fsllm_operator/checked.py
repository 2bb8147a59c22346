"""How a command shows what it has found of a file that a person wrote: a plan, a study."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import click
from rich.table import Table

from fsllm_common.errors import Exit, FsllmError
from fsllm_operator.console import stdout


class Checked(Protocol):
    """A valid file, and what is to be said of it."""

    @property
    def warnings(self) -> Sequence[str]:
        """What may be unwise in it."""

    def rows(self) -> Iterable[tuple[str, str]]:
        """Return subjects and sentences."""

    def as_object(self) -> Mapping[str, Any]:
        """Return the same for ``--json``."""


def show_check(ctx: click.Context, check: Callable[[], Checked], valid: str, *, as_json: bool) -> None:
    """Print what a check finds.

    Args:
        ctx: Ended with the error's exit code where the file is not valid and JSON was asked for.
        check: Reads the file.
        valid: The last line, where it is valid.
        as_json: Print an object, in both cases.

    Raises:
        FsllmError: The file is not valid, and ``as_json`` is not set.

    """
    try:
        found = check()
    except FsllmError as error:
        if not as_json:
            raise
        wrong = {"valid": False, "reason": error.reason, "message": error.message, "cure": error.cure}
        click.echo(json.dumps(wrong, indent=2))
        ctx.exit(error.exit_code or Exit.CONFIGURATION)
    if as_json:
        click.echo(json.dumps(found.as_object(), indent=2))
        return
    console = stdout()
    table = Table.grid(padding=(0, 2))
    for subject, sentence in found.rows():
        table.add_row(f"[bold]{subject}[/]", sentence)
    console.print(table)
    for warning in found.warnings:
        console.print(f"[yellow]Warning:[/] {warning}", highlight=False)
    click.echo(valid)
