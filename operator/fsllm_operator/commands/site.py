"""``fsllm site``."""

import json
from pathlib import Path

import click
from rich.table import Table

from fsllm.v1.control_pb2 import ListMembersRequest, Member, RevokeMemberRequest
from fsllm_common.identity.names import Role
from fsllm_operator.as_json import member_object
from fsllm_operator.connection import Connection
from fsllm_operator.console import stdout
from fsllm_operator.invitations import invite as make_invitation
from fsllm_operator.invitations import tell
from fsllm_operator.options import Duration, connected, json_option

_STYLES = {"enrolled": "green", "revoked": "red", "invited": "yellow"}


@click.group()
def site() -> None:
    """Invite, list and revoke the members of the federation."""


@site.command(
    epilog="""
\b
fsllm site invite hospital-a -o hospital-a.join --host fed.example.org
fsllm site invite referee -o referee.join --role evaluator --valid 7d
"""
)
@connected
@click.argument("name")
@click.option("-o", "--output", required=True, type=click.Path(dir_okay=False, path_type=Path), help="The join file.")
@click.option(
    "--role",
    type=click.Choice([Role.SITE.value, Role.EVALUATOR.value]),
    default=Role.SITE.value,
    show_default=True,
    help="A site trains on its own data; an evaluator only measures, on a common held-out file.",
)
@click.option("--valid", type=Duration(), default="72h", show_default=True, help="How long the file can be used.")
@click.option("--host", help="The name under which the member reaches the server. Default: the server's own idea.")
def invite(connection: Connection, name: str, output: Path, role: str, valid: int, host: str | None) -> None:
    """Make a join file for NAME: one use, readable by you only."""
    tell(make_invitation(connection, name, Role(role), valid, output, host), output)


@site.command("list")
@connected
@json_option
def list_members(connection: Connection, as_json: bool) -> None:
    """Show every member: its standing, whether it is attached, and its certificate's end."""
    members = sorted(
        connection.call(connection.control.ListMembers, ListMembersRequest(), repeat=True).members,
        key=lambda m: (m.role, m.name),
    )
    if as_json:
        click.echo(json.dumps([member_object(member) for member in members], indent=2))
        return
    if not members:
        click.echo("No members yet. Invite one: fsllm site invite NAME -o FILE")
        return
    stdout().print(_table(members))


@site.command()
@connected
@click.argument("name")
@click.option("--yes", is_flag=True, help="Do not ask.")
@json_option
def revoke(connection: Connection, name: str, yes: bool, as_json: bool) -> None:
    """Revoke NAME at once: its certificate, and its live connections.

    This can not be undone; invite it again under the same name for a new certificate.
    """
    if not yes:
        click.confirm(f"Revoke {name}? Its connections end at once and its certificate never works again", abort=True)
    member = connection.call(connection.control.RevokeMember, RevokeMemberRequest(name=name), repeat=True).member
    click.echo(json.dumps(member_object(member), indent=2) if as_json else f"{member.name or name} is revoked.")


def _table(members: list[Member]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("name", "role", "standing", "attached", "certificate until (UTC)", "software", "GPUs"):
        table.add_column(heading)
    for member in members:
        at = member.certificate_not_after
        table.add_row(
            member.name,
            member.role,
            f"[{_STYLES.get(member.standing, 'default')}]{member.standing}[/]",
            "yes" if member.attached else "no",
            at.ToDatetime().strftime("%Y-%m-%d %H:%M") if at.seconds else "-",
            member.software_version or "-",
            str(member.capabilities.gpus) if member.software_version else "-",
        )
    return table
