"""``fsllm tune``."""

import json
from pathlib import Path

import click

# Here, so that a missing package is told when the command is looked up.
import matplotlib  # noqa: F401  # isort: skip
import optuna  # noqa: F401  # isort: skip
from fsllm_operator.checked import show_check
from fsllm_operator.connection import Connection
from fsllm_operator.console import stdout
from fsllm_operator.options import connected, json_option, server_options
from fsllm_operator.tune.cost import cost
from fsllm_operator.tune.optimise import Optimiser
from fsllm_operator.tune.plot import write_plot
from fsllm_operator.tune.search import Trial, best, open_search, read_trials
from fsllm_operator.tune.show import audience, ending
from fsllm_operator.tune.space import Space
from fsllm_operator.tune.table import best_file, plot_file, study_object, trials_table, write_best


@click.command(
    epilog="""
\b
fsllm tune study.yaml --check      is it valid, and what would it cost?
fsllm tune study.yaml              begin, or go on where it stands
fsllm tune study.yaml --show       the table and the plot, while it runs too
fsllm run submit study-best.yaml   the best plan found
\b
Beside study.yaml lie its trials (study.db), the best plan (study-best.yaml) and the plot (study.svg).
docs/tune.md explains the keys.
Exit codes: 0 all trials have ended; 3 study or plan; 11 too many trials failed in a row; 130 Ctrl-C (runs go on).
"""
)
@server_options
@click.argument("study", type=click.Path(path_type=Path))
@click.option("--check", is_flag=True, help="Only check it and say what it would cost. Needs no server.")
@click.option("--show", is_flag=True, help="Only show the trials there are, and draw the plot. Needs no server.")
@json_option
@click.pass_context
def tune(
    ctx: click.Context,
    study: Path,
    check: bool,
    show: bool,
    as_json: bool,
    server: str | None,
    credential: Path | None,
) -> None:
    """Search for the best values of a plan's keys over runs, as the file STUDY says.

    Every trial is a run of its own. The command may be ended at any time and given again: it finds its runs where they
    stand and makes none twice.
    """
    if check and show:
        raise click.UsageError("--check and --show do not go together.")
    if check:
        valid = f"{study} is valid, with every combination of its values' ends."
        show_check(ctx, lambda: cost(Space.read(study)), valid, as_json=as_json)
    elif show:
        space = Space.read(study)
        trials = read_trials(space)
        _write(space, trials)
        _conclude(space, trials, as_json=as_json)
    else:
        _run(Space.read(study), as_json, server=server, credential=credential)


@connected
def _run(connection: Connection, space: Space, as_json: bool) -> None:
    console = stdout()
    with open_search(space) as search:
        listener, context = audience(search, console, as_json=as_json)
        try:
            with context:
                Optimiser(connection, search, listener).run()
        except KeyboardInterrupt:
            click.echo(
                f"\nRuns under way go on at the server. `fsllm tune {space.file}` takes the study up where it stands.",
                err=True,
            )
            raise
        finally:
            trials = search.trials()
            _write(space, trials)
    _conclude(space, trials, as_json=as_json)


def _write(space: Space, trials: list[Trial]) -> None:
    if trials:
        write_plot(space, trials)
        write_best(space, trials)


def _conclude(space: Space, trials: list[Trial], *, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps({"kind": "study", **study_object(space, trials)}))
        return
    if not trials:
        click.echo(f"No trials yet: fsllm tune {space.file}")
        return
    stdout().print(trials_table(space, trials))
    click.echo(f"{len(trials)} of {space.study.trials} trials: {ending(trials)}. Plot: {plot_file(space.file)}")
    if best(trials, space.study) is not None:
        click.echo(f"The best plan is in {best_file(space.file)}:")
        click.echo(f"  fsllm run submit {best_file(space.file)} --watch")
