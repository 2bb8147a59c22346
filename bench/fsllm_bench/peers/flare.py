"""NVIDIA FLARE: provisioned with certificates by its own tool, started by its own scripts, mTLS over gRPC."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Final

from fsllm_bench.peers.environment import (
    APPS,
    TENSORS,
    Environment,
    Outcome,
    mentioning,
    peak_memory,
    round_ends,
)

VERSION: Final = "2.9.0"
_READY_SECONDS: Final = 180
_JOB_SECONDS: Final = 3600


def measure(root: Path, mebibytes: float, sites: int, rounds: int) -> Outcome:
    """Run so many rounds of FedAvg over made-up arrays.

    Raises:
        subprocess.CalledProcessError: A command of FLARE failed; its output is in the message.

    """
    here = Environment(root, "nvflare", VERSION)
    place = here.work / "poc"
    times = here.work / "times"
    times.unlink(missing_ok=True)
    shutil.rmtree(place, ignore_errors=True)
    variables = here.variables(NVFLARE_POC_WORKSPACE=str(place))

    def flare(*arguments: str) -> str:
        done = subprocess.run(
            [here.command("nvflare"), *arguments], env=variables, check=False, capture_output=True, text=True
        )
        if done.returncode:
            raise SystemExit(f"nvflare {' '.join(arguments)}: {done.stdout[-2000:]} {done.stderr[-2000:]}")
        return done.stdout

    flare("poc", "prepare", "-n", str(sites), "--force")
    kits = place / "example_project" / "prod_00"
    admin = str(kits / "admin@nvidia.com")
    job = _write_job(here.work / "job", mebibytes, sites, rounds, times)
    with peak_memory(lambda: mentioning(f"{kits}/server")) as peak:
        try:
            flare("poc", "start", "--timeout", str(_READY_SECONDS))
            said = flare("job", "submit", "-j", str(job), "--startup-kit", admin)
            number = next(line.split()[1] for line in said.splitlines() if line.startswith("job_id:"))
            flare("job", "wait", number, "--startup-kit", admin, "--timeout", str(_JOB_SECONDS))
        finally:
            flare("poc", "stop")
        return Outcome(round_ends(times), peak())


def _write_job(job: Path, mebibytes: float, sites: int, rounds: int, times: Path) -> Path:
    shutil.rmtree(job, ignore_errors=True)
    for folder in ("app/config", "app/custom"):
        (job / folder).mkdir(parents=True)
    for name in ("flare_server.py", "flare_client.py"):
        shutil.copy(APPS / name, job / "app" / "custom" / name)
    workflow = {
        "id": "rounds",
        "path": "flare_server.Rounds",
        "args": {
            "num_clients": sites,
            "num_rounds": rounds,
            "mebibytes": mebibytes,
            "tensors": TENSORS,
            "times": str(times),
        },
    }
    executor = {
        "path": "nvflare.app_common.executors.client_api_executor.ClientAPIExecutor",
        "args": {
            "execution_mode": "in_process",
            "task_script_path": "flare_client.py",
            "params_exchange_format": "numpy",
            "server_expected_format": "numpy",
        },
    }
    files = {
        "meta.json": {"name": "rounds", "resource_spec": {}, "min_clients": sites, "deploy_map": {"app": ["@ALL"]}},
        "app/config/config_fed_server.json": {"format_version": 2, "workflows": [workflow], "components": []},
        "app/config/config_fed_client.json": {
            "format_version": 2,
            "executors": [{"tasks": ["train"], "executor": executor}],
            "components": [],
        },
    }
    for name, content in files.items():
        (job / name).write_text(json.dumps(content, indent=2))
    return job
