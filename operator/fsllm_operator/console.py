"""Where commands print: as wide as the terminal, or, into a pipe or file, as wide as a line wants to be."""

from typing import Final

from rich.console import Console

_UNBOUNDED: Final = 1000


def stdout() -> Console:
    """Return a console on standard output."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = _UNBOUNDED
    return console
