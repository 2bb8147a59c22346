"""What a study under way looks like: on a terminal, in a pipe, to a program."""

import io
import json
from pathlib import Path

import pytest
from control_harness import connected
from rich.console import Console
from tune_harness import Server, write_study

from fsllm_operator.tune.optimise import Optimiser
from fsllm_operator.tune.search import open_search
from fsllm_operator.tune.show import audience, ending
from fsllm_operator.tune.space import Space

CURVES = ((1.0, 0.9, 0.8, 0.7), (1.2, 0.1, 0.1, 0.1))


def show(folder: Path, console: Console, *, as_json: bool = False) -> None:
    study = write_study(folder, "method: halving\ntrials: 2\n")
    with connected(folder, Server(CURVES)) as connection, open_search(Space.read(study)) as search:
        listener, context = audience(search, console, as_json=as_json)
        with context:
            Optimiser(connection, search, listener).run()
        assert ending(search.trials()) == "1 done, 1 pruned"


def test_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    show(tmp_path, Console(file=io.StringIO()))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("Trial 0: train.learning_rate 0.00")
    assert lines[0].endswith("; run 0-0")
    assert lines[1:6] == [
        *(f"Trial 0, round {at}: validation loss {loss:.4f}" for at, loss in enumerate(CURVES[0], 1)),
        "Trial 0 is done; the best so far is trial 0 with 0.7000.",
    ]
    assert lines[-1] == ("Trial 1 is pruned, not among the best after round 1; the best so far is trial 0 with 0.7000.")


def test_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    show(tmp_path, Console(file=io.StringIO()), as_json=True)
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(one["kind"], one["trial"], one.get("state", one.get("round"))) for one in told] == [
        ("trial", 0, "running"),
        *(("round", 0, at) for at in (1, 2, 3, 4)),
        ("trial", 0, "done"),
        ("trial", 1, "running"),
        ("round", 1, 1),
        ("trial", 1, "pruned"),
    ]


def test_a_terminal(tmp_path: Path) -> None:
    screen = io.StringIO()
    show(tmp_path, Console(file=screen, force_terminal=True, width=160, color_system=None, legacy_windows=False))
    last = screen.getvalue().rpartition("unit")[2]
    for words in ("2 of 2 trials", "best: trial 0 with 0.7000", "not among the best after round 1", "0-1"):
        assert words in last
