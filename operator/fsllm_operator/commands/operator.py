"""``fsllm operator``."""

from pathlib import Path

import click

from fsllm_common.identity.names import Role
from fsllm_operator.connection import Connection
from fsllm_operator.invitations import invite as make_invitation
from fsllm_operator.invitations import tell
from fsllm_operator.options import Duration, connected


@click.group()
def operator() -> None:
    """Invite another operator."""


@operator.command(epilog="\b\nfsllm operator invite alice -o alice.join --host fed.example.org")
@connected
@click.argument("name")
@click.option("-o", "--output", required=True, type=click.Path(dir_okay=False, path_type=Path), help="The join file.")
@click.option("--valid", type=Duration(), default="24h", show_default=True, help="How long the file can be used.")
@click.option("--host", help="The name under which the operator reaches the server. Default: the server's own idea.")
def invite(connection: Connection, name: str, output: Path, valid: int, host: str | None) -> None:
    """Make a join file for the operator NAME.

    Operators may do everything: submit, steer and export runs, invite and revoke members.
    """
    tell(make_invitation(connection, name, Role.OPERATOR, valid, output, host), output)
