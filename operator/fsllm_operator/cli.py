"""The command ``fsllm``: subcommands that are imported when they are called, and errors that a person can act on."""

import importlib
from typing import Any, Final

import click

from fsllm_common import __version__
from fsllm_common.errors import Exit, InputError
from fsllm_common.failure import Failure, FailureGroup

INTERRUPTED: Final = 130
"""The exit code after Ctrl-C, as shells use it."""

_COMMANDS: Final = {
    "demo": "fsllm_bench.demo.cli:demo",
    "doctor": "fsllm_operator.commands.doctor:doctor",
    "login": "fsllm_operator.commands.login:login",
    "operator": "fsllm_operator.commands.operator:operator",
    "plan": "fsllm_operator.commands.plan:plan",
    "run": "fsllm_operator.commands.run:run",
    "site": "fsllm_operator.commands.site:site",
    "tune": "fsllm_operator.commands.tune:tune",
}
_SUMMARIES: Final = {
    "demo": "A federation of three sites on this machine, from nothing to an adapter.",
    "doctor": "Check the way to the server, certificates, clocks and disk.",
    "login": "Make this host an operator's, with a join file from another operator.",
    "operator": "Invite another operator.",
    "plan": "Check a plan, print its schema or an example.",
    "run": "Submit, watch, steer and export runs.",
    "site": "Invite, list and revoke the members of the federation.",
    "tune": "Search for a plan's best values over runs: a study.",
}

_EXTRAS: Final = {"demo": "bench", "tune": "tune"}
"""The commands that stand on more than the base install, and the extra that has it."""

_EPILOG: Final = f"""
\b
A federation from nothing:
  fsllm-server --port 50051                              on the server's host; leave it running
  fsllm site invite hospital-a -o hospital-a.join        there too; give the file to the site
  fsllm-client --server HOST:50051 --data ./private --join hospital-a.join     at the site
  fsllm plan example > plan.yaml                         then edit it
  fsllm plan check plan.yaml
  fsllm run submit plan.yaml --watch
  fsllm run export RUN -o adapter/

\b
Where fsllm finds its server and credential, first found wins:
  --server HOST:PORT and --credential FOLDER, or FSLLM_SERVER and FSLLM_CREDENTIAL
  the state folder of a server on this host (its own operator credential)
  ~/.config/fsllm/operator, made by `fsllm login --join FILE`

\b
Exit codes: 0 done, {Exit.USAGE} wrong usage, {Exit.CONFIGURATION} plan or setting, {Exit.IDENTITY} identity,
{Exit.REFUSED} refused, {Exit.UNAVAILABLE} server not reached, {Exit.STORAGE} disk or a broken round,
{Exit.RUN_FAILED} the run is paused or was cancelled, {INTERRUPTED} Ctrl-C.
docs/errors.md lists every reason and its cure.
"""


class Root(FailureGroup):
    """The group of all commands. It imports a command's module only when that command runs."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names, sorted."""
        return sorted(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a command.

        Raises:
            Failure: TRAINER_MISSING: the command's packages are not installed.

        """
        place = _COMMANDS.get(cmd_name)
        if place is None:
            return None
        module, _, name = place.partition(":")
        try:
            command: click.Command = getattr(importlib.import_module(module), name)
        except ModuleNotFoundError as error:
            if cmd_name not in _EXTRAS or (error.name or "").startswith("fsllm"):
                raise
            raise Failure(
                InputError(
                    "TRAINER_MISSING",
                    f"`fsllm {cmd_name}` needs the package {error.name}, which is not installed",
                    cure=f"Install it: pip install 'fsllm[{_EXTRAS[cmd_name]}]'.",
                )
            ) from error
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, _SUMMARIES[name]) for name in self.list_commands(ctx)])

    def invoke(self, ctx: click.Context) -> Any:  # noqa: ANN401 (click's signature)
        """Run a command; Ctrl-C is a clean end."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            click.echo(err=True)
            ctx.exit(INTERRUPTED)


@click.group(
    cls=Root, epilog=_EPILOG, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.version_option(__version__, prog_name="fsllm")
def main() -> None:
    """Run federations of language-model fine-tuning: the operator's and researcher's tool."""
