"""What a round costs a site besides training, measured in a real federation: a server and two sites, mTLS between them.

Two waits a round: from the commit of a version at the server to the first training step at a site, and from a site's
last step to the server's receipt, which stands for a synced delta. Nothing is evaluated between the rounds, or the
evaluation would count as a wait.
"""

from __future__ import annotations

import json
import os
import urllib.request
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Final

import yaml

from fsllm_bench.federation import served
from fsllm_bench.training.setting import Setting
from fsllm_common.errors import TrainingFailed
from fsllm_common.plan import canonical_json

_SITES: Final = ("site-a", "site-b")
_STEPS: Final = 2


@dataclass(frozen=True, slots=True)
class Overhead:
    """Seconds, one value a site and round; the first round is left out."""

    start: list[float]
    """From the commit to the first step."""
    finish: list[float]
    """From the last step to the receipt."""
    rounds: int
    trainer_starts: list[int]
    """Processes, one value a site: 1."""
    prepares: list[int]
    """Model loads, each with one tokenisation, one value a site: 1."""


def measure(setting: Setting, rounds: int) -> Overhead:
    """Run a federation on the setting's model and rows."""
    folder = setting.folder / "federation"
    folder.mkdir()
    threads = max(1, (os.cpu_count() or 1) // len(_SITES))
    with served(folder) as here:
        for name in _SITES:
            options = ("--log-format", "json", "--trainer-threads", str(threads))
            here.start_site(name, setting.data, *options, models={"model": setting.model})
        plan = folder / "plan.yaml"
        plan.write_text(yaml.safe_dump(_plan(setting, rounds)))
        here.fsllm("run", "submit", str(plan), "--watch")
        run: dict[str, Any] = json.loads(here.fsllm("run", "show", "overhead", "--json"))
        logs = {name: _lines(here.log(name)) for name in _SITES}
        pages = [_metrics(lines) for lines in logs.values()]
    commits = {commit["round"]: datetime.fromisoformat(commit["at"]) for commit in run["commits"]}
    start, finish = [], []
    for lines in logs.values():
        for line in lines:
            if line["event"] == "first step" and line["round"] > 1:
                began = datetime.fromisoformat(line["timestamp"])
                start.append((began - commits[line["round"] - 1]).total_seconds())
            if line["event"] == "receipt" and line["round"] > 1:
                finish.append(line["seconds_after_last_step"])
    if len(start) != len(_SITES) * (rounds - 1) or len(finish) != len(start):
        raise TrainingFailed("INTERNAL", f"{len(start)} first steps and {len(finish)} receipts in the sites' logs")
    return Overhead(
        start,
        finish,
        rounds,
        [page["fsllm_client_trainer_starts_total"] for page in pages],
        [page["fsllm_client_trainer_prepares_total"] for page in pages],
    )


def _plan(setting: Setting, rounds: int) -> dict[str, Any]:
    plan: dict[str, Any] = json.loads(canonical_json(setting.plan))
    plan.update(
        name="overhead",
        rounds=rounds,
        cohort={"quorum": len(_SITES)},
        timing={"gather_seconds": 0.01, "recruit_seconds": 120.0},
        evaluate={"every": 0, "base": False, "metrics": []},
    )
    plan["train"].update(steps=_STEPS, epochs=None)
    return plan


def _lines(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")]


def _metrics(lines: list[dict[str, Any]]) -> dict[str, int]:
    """Return a daemon's counters without labels, from where its log says that they are served."""
    address = next(line["address"] for line in lines if line["event"] == "metrics are served")
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as page:
        text = page.read().decode()
    pairs = (line.split(" ") for line in text.splitlines() if not line.startswith("#") and "{" not in line)
    return {name: int(float(value)) for name, value in pairs}
