"""``fsllm doctor``."""

import json
from pathlib import Path

import click
from rich.text import Text

from fsllm_operator.checks import Check, examine
from fsllm_operator.console import stdout
from fsllm_operator.options import json_option, server_options

_MARKS = {"ok": ("ok", "green"), "warning": ("warn", "yellow"), "failed": ("FAIL", "red")}


@click.command(epilog="\b\nExit codes: 0 when nothing failed, else that of the first failure (docs/errors.md).")
@server_options
@json_option
@click.pass_context
def doctor(ctx: click.Context, server: str | None, credential: Path | None, as_json: bool) -> None:
    """Check the way to the server from here: credential, network, certificates, clocks, disk, members.

    The two ends have their own: `fsllm-server doctor` on the server's host, `fsllm-client doctor` at a site.
    """
    checks = examine(server, credential)
    if as_json:
        click.echo(json.dumps([check.as_object() for check in checks], indent=2))
    else:
        _print(checks)
    ctx.exit(next((check.exit_code for check in checks if check.outcome == "failed"), 0))


def _print(checks: list[Check]) -> None:
    console = stdout()
    width = max(len(check.name) for check in checks)
    for check in checks:
        mark, colour = _MARKS[check.outcome]
        console.print(Text(f"{mark:5}", style=colour), Text(f"{check.name:{width}}  {check.message}"), soft_wrap=True)
        if check.cure and check.outcome != "ok":
            console.print(Text(f"{'':6}{'':{width}}  {check.cure}", style="dim"), soft_wrap=True)
    console.print("For the two ends: `fsllm-server doctor` on the server's host, `fsllm-client doctor` at each site.")
