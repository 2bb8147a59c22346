"""Options that several commands share."""

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import click

from fsllm_common.errors import Unavailable
from fsllm_operator.connection import Connection
from fsllm_operator.credentials import connect, discover

P = ParamSpec("P")
R = TypeVar("R")

_UNITS = {"m": 60, "h": 3600, "d": 86_400}


def server_options(command: Callable[P, R]) -> Callable[P, R]:
    """Add --server and --credential."""
    command = click.option(
        "--credential",
        type=click.Path(exists=True, file_okay=False, path_type=Path),
        envvar="FSLLM_CREDENTIAL",
        show_envvar=True,
        help="The folder of the operator's credential. Default: a server's on this host, else `fsllm login`'s.",
    )(command)
    return click.option(
        "--server",
        metavar="HOST:PORT",
        envvar="FSLLM_SERVER",
        show_envvar=True,
        help="The server. Default: the one that the credential is for.",
    )(command)


def connected(command: Callable[Concatenate[Connection, P], R]) -> Callable[..., R]:
    """Add --server and --credential, and call the command with an open connection as its first argument."""

    @server_options
    @functools.wraps(command)
    def wrapper(*args: Any, server: str | None, credential: Path | None, **kwargs: Any) -> R:  # noqa: ANN401
        place = discover(server, credential)
        try:
            with connect(place) as connection:
                return command(connection, *args, **kwargs)
        except Unavailable as error:
            # gRPC has one word for most causes; a handshake of our own tells them apart.
            raise place.probe() or error if error.reason == "SERVER_UNREACHABLE" else error from error

    return wrapper


def json_option(command: Callable[P, R]) -> Callable[P, R]:
    """Add --json."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")(command)


class Duration(click.ParamType[int]):
    """A span of time such as 90m, 72h or 3d, in seconds."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:  # noqa: ANN401
        """Return the seconds."""
        match = re.fullmatch(r"([1-9]\d{0,4})([mhd])", str(value))
        if match is None:
            self.fail(f"{value!r} is not a span of time; write for example 90m, 72h or 3d", param, ctx)
        return int(match[1]) * _UNITS[match[2]]
