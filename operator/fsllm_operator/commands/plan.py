"""``fsllm plan``."""

import json
from pathlib import Path

import click

from fsllm_common.plan import Plan, plan_from_file
from fsllm_operator.checked import show_check
from fsllm_operator.plan_report import report
from fsllm_operator.reference import plan_example, plan_reference


@click.group()
def plan() -> None:
    """Check a plan, print its schema or an example. Needs no server."""


@plan.command(
    epilog="""
\b
fsllm plan check plan.yaml
fsllm plan check plan.yaml --model /srv/models/SmolLM2-135M-Instruct
Exit codes: 0 the plan is valid (warnings do not count), 3 it is not.
"""
)
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--model",
    type=click.Path(path_type=Path),
    help="The base model's folder, to count the adapter's parameters; only its config.json is read.",
)
@click.option(
    "--parameters", type=click.IntRange(min=1), help="The adapter's parameters, where they can not be counted."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")
@click.pass_context
def check(ctx: click.Context, file: Path, model: Path | None, parameters: int | None, as_json: bool) -> None:
    """Check the plan FILE (.yaml, .toml or .json) and say what it means: bytes, privacy, warnings."""
    show_check(ctx, lambda: report(plan_from_file(file), model, parameters), f"{file} is valid.", as_json=as_json)


@plan.command()
@click.option("--markdown", is_flag=True, help="Every key with its type, default and meaning, as in docs/plans.md.")
def schema(markdown: bool) -> None:
    """Print the plan's JSON schema, which editors use to complete and check YAML and JSON."""
    click.echo(plan_reference() if markdown else json.dumps(Plan.model_json_schema(), indent=2))


@plan.command()
def example() -> None:
    """Print a plan with every key at its default and what it means: a file to start from."""
    click.echo(plan_example(), nl=False)
