"""What a round costs a site besides training, measured in a real federation: a server and two sites, mTLS between them.

Two waits a round: from the commit of a version at the server to the first training step at a site, and from a site's
last step to the server's receipt, which stands for a synced delta. Nothing is evaluated between the rounds, or the
evaluation would count as a wait.
"""

from __future__ import annotations

import json
import os
import subprocess
import urllib.request
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Final

import yaml

from fsllm_bench.daemons import Daemons, command, daemon_environment
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
    state = folder / "server"
    with Daemons(folder / "logs", daemon_environment()) as daemons:
        daemons.start(
            "server",
            [command("fsllm-server"), "--port", "0", "--metrics-port", "0", "--state-dir", str(state)],
            await_ready=True,
        )
        port = json.loads((state / "server.json").read_text())["port"]
        for name in _SITES:
            _start_site(daemons, folder, name, port, setting)
        plan = folder / "plan.yaml"
        plan.write_text(yaml.safe_dump(_plan(setting, rounds)))
        _fsllm(state, "run", "submit", str(plan), "--watch")
        run: dict[str, Any] = json.loads(_fsllm(state, "run", "show", "overhead", "--json"))
        logs = {name: _lines(folder / "logs" / f"{name}.log") for name in _SITES}
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


def _start_site(daemons: Daemons, folder: Path, name: str, port: int, setting: Setting) -> None:
    join = folder / f"{name}.join"
    _fsllm(folder / "server", "site", "invite", name, "--host", "localhost", "-o", str(join))
    state = folder / name
    state.mkdir(mode=0o700)
    policy = state / "policy.toml"
    policy.write_text(f"[models]\nmodel = {json.dumps(str(setting.model))}\n")
    daemons.start(
        name,
        [
            command("fsllm-client"),
            *("--server", f"localhost:{port}", "--data", str(setting.data), "--join", str(join)),
            *("--state-dir", str(state), "--policy", str(policy), "--log-format", "json", "--metrics-port", "0"),
            *("--trainer-threads", str(max(1, (os.cpu_count() or 1) // len(_SITES)))),
        ],
    )


def _lines(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")]


def _metrics(lines: list[dict[str, Any]]) -> dict[str, int]:
    """Return a daemon's counters without labels, from where its log says that they are served."""
    address = next(line["address"] for line in lines if line["event"] == "metrics are served")
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as page:
        text = page.read().decode()
    pairs = (line.split(" ") for line in text.splitlines() if not line.startswith("#") and "{" not in line)
    return {name: int(float(value)) for name, value in pairs}


def _fsllm(state: Path, *arguments: str) -> str:
    done = subprocess.run(
        [command("fsllm"), *arguments],
        env=daemon_environment() | {"FSLLM_STATE_DIR": str(state), "HOME": str(state.parent)},
        check=False,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise TrainingFailed("INTERNAL", f"fsllm {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout
