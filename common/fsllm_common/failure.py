"""How the three commands end with an error that they know: two lines on standard error, and a documented exit code."""

from typing import Any

import click

from fsllm_common import failpoints
from fsllm_common.errors import FsllmError


class Failure(click.ClickException):
    """An FsllmError as a command shows it: what is wrong and where, then the cure."""

    def __init__(self, error: FsllmError) -> None:
        super().__init__(error.message)
        self.error = error
        self.exit_code = error.exit_code  # type: ignore[misc]  # click declares it on the class, reads it from here

    def show(self, file: Any = None) -> None:  # noqa: ANN401 (click's signature)
        """Print the two lines."""
        click.echo(f"{click.style('Error:', fg='red')} {self.message} [{self.error.reason}]", file=file, err=True)
        if self.error.cure:
            click.echo(f"  {self.error.cure}", file=file, err=True)


class FailureGroup(click.Group):
    """A group of commands. A known error in any of them becomes a ``Failure``; a bug keeps its traceback."""

    def invoke(self, ctx: click.Context) -> Any:  # noqa: ANN401 (click's signature)
        """Run the command."""
        try:
            failpoints.arm()
            return super().invoke(ctx)
        except FsllmError as error:
            raise Failure(error) from error
        except OSError as error:
            if error.filename is None:
                raise
            # Another user's file, a folder where a file should be: it is on this host that something is to be mended.
            message = f"{error.filename}: {error.strerror}"
            known = FsllmError("DISK_FAILED", message, cure="Check the path, its owner and its permissions.")
            raise Failure(known) from error
