"""Inviting a member: the server's token as a join file, and what to do with it."""

from datetime import UTC
from pathlib import Path
from typing import Final

import click

from fsllm.v1.control_pb2 import InviteRequest, InviteResponse
from fsllm_common.errors import SettingsInvalid
from fsllm_common.identity.join import JoinFile, write_join_file
from fsllm_common.identity.names import Role, check_name
from fsllm_operator.connection import Connection

_LOOPBACK: Final = ("localhost", "127.0.0.1", "::1", "0.0.0.0", "::", "")  # noqa: S104 (compared, not bound)


def invite(
    connection: Connection, name: str, role: Role, valid_seconds: int, output: Path, host: str | None
) -> JoinFile:
    """Make a token and write its join file. Nothing is asked of the server unless the file can be written.

    Raises:
        FsllmError: NAME_INVALID, MEMBER_EXISTS, SETTING_INVALID: the file exists or its folder does not.

    """
    check_name(name, role)
    if output.exists():
        raise SettingsInvalid(
            f"{output} exists; a join file is not overwritten", cure="Name another file with -o, or delete it."
        )
    if not output.absolute().parent.is_dir():
        raise SettingsInvalid(f"The folder of {output} does not exist", cure="Make it, or name another file with -o.")
    answer = connection.call(
        connection.control.Invite, InviteRequest(name=name, role=role, valid_seconds=valid_seconds)
    )
    join = JoinFile(
        federation=answer.federation,
        role=role,
        name=name,
        host=host or _public_host(answer, connection.server),
        port=answer.port,
        enrollment_port=answer.enrollment_port,
        ca_certificate=answer.ca_certificate.decode(),
        token=answer.token,
        expires=answer.expires.ToDatetime(tzinfo=UTC),
    )
    write_join_file(output, join)
    return join


def tell(join: JoinFile, output: Path) -> None:
    """Print what the file is and what to do with it."""
    server = f"{join.host}:{join.port}"
    click.echo(
        f"Wrote {output}: works once, until {join.expires.astimezone():%Y-%m-%d %H:%M %Z}, readable by you only."
    )
    click.echo(f"Carry it to {join.name} by a way you trust (whoever has it can join as {join.name}). There:")
    if join.role is Role.OPERATOR:
        click.echo(f"  fsllm login --join {output.name}")
    else:
        data = "./private" if join.role is Role.SITE else "./held-out.jsonl"
        click.echo(f"  fsllm-client --server {server} --data {data} --join {output.name}")
        click.echo("and ever after the same without --join.")
    if join.host in _LOOPBACK:
        click.echo(
            f"Note: the file names the server as {join.host}, which only this host can reach. For another host, invite "
            "with --host NAME, under which the server is reached from there.",
            err=True,
        )


def _public_host(answer: InviteResponse, server: str) -> str:
    """Return the server's own idea of its name; else the name we reach it by."""
    if answer.host not in _LOOPBACK:
        return answer.host
    reached = server.rpartition(":")[0].strip("[]")
    return reached if reached not in _LOOPBACK else answer.host or "localhost"
