"""Rounds with a real trainer: between them no process is started, no model loaded and nothing tokenised again."""

import urllib.request
from pathlib import Path

import pytest
from tests.system.harness import ServerProcess
from tests.system.runs import await_done, plan_for, submit
from tests.system.site_process import SiteProcess

pytestmark = pytest.mark.slow

ROUNDS = 4


def metrics(site: SiteProcess) -> dict[str, float]:
    address = site.await_log("metrics are served")["address"]
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as page:
        lines = page.read().decode().splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#")}


def test_a_run_of_many_rounds_prepares_once_and_measures_what_a_round_costs(
    tmp_path: Path, tiny_model: Path, tiny_rows: Path, extensions: Path
) -> None:
    policy = f'[models]\ntiny = "{tiny_model}"\n'
    with ServerProcess(tmp_path / "server") as server:
        sites = []
        for name in ("site-a", "site-b"):
            (tmp_path / name).mkdir()
            (tmp_path / name / "policy.toml").write_text(policy)
            arguments = ("--metrics-port", "0", "--torch-extensions-dir", str(extensions), "--trainer-threads", "1")
            sites.append(SiteProcess(server, tmp_path / name, tiny_rows, *arguments))
        with sites[0], sites[1]:
            plan = plan_for(
                *sites,
                rounds=ROUNDS,
                model={"name": "tiny"},
                algorithm={"name": "fedavg"},
                train={"steps": 2, "batch_size": 4, "precision": "fp32", "optimizer_state": "keep"},
                data={"template": "plain", "max_length": 24, "validation_fraction": 0.2},
                evaluate={"metrics": ["loss"], "every": 2},
            )
            await_done(server, submit(server, plan))
            for site in sites:
                found = metrics(site)
                orders = (site.state / "trainer" / "trainer.log").read_text()
                assert found["fsllm_client_trainer_starts_total"] == 1
                assert found["fsllm_client_trainer_prepares_total"] == 1
                assert orders.count("order: prepare") == 1
                assert orders.count("order: train") == ROUNDS
                assert orders.count("order: evaluate") > 1
                for end in ("start", "finish"):
                    assert found[f"fsllm_client_round_{end}_seconds_count"] == ROUNDS
                    assert found[f"fsllm_client_round_{end}_seconds_sum"] > 0
                starts, orders_seconds = (
                    found["fsllm_client_round_start_seconds_sum"] + found["fsllm_client_round_finish_seconds_sum"],
                    found['fsllm_client_order_seconds_sum{kind="train"}'],
                )
                assert starts < orders_seconds, "the two waits leave room for the training between them"
