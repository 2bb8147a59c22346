"""Federated DPO for real: two daemons learn from their own pairs of answers, and version 0 prefers nothing."""

import json
import math
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file
from tests.system.harness import ServerProcess
from tests.system.runs import await_done, submit
from tests.system.site_process import SiteProcess

from fsllm.v1.control_pb2 import Commit
from fsllm_client.trainer.orders import Build, Evaluate, Prepare, Train
from fsllm_client.trainer.supervisor import Trainer
from fsllm_common.plan import Plan

pytestmark = pytest.mark.slow

PLAN: dict[str, Any] = {
    "name": "preferences",
    "seed": 3,
    "rounds": 2,
    "model": {"name": "embedded"},
    "adapter": {"rank": 4},
    "algorithm": {"name": "dpo", "parameters": {"beta": 0.2}},
    "timing": {"gather_seconds": 0.1},
    "train": {"steps": 4, "batch_size": 8, "learning_rate": 3e-3, "precision": "fp32"},
    "data": {"format": "preference", "template": "brief", "packing": False, "validation_fraction": 0.3},
    "evaluate": {"metrics": ["loss", "reward_accuracy"], "limit": 12},
}


def _measured(commit: Commit, name: str) -> float:
    found = [metric for member in commit.metrics for metric in member.metrics if metric.name == name]
    assert len(found) == 2, found
    return sum(m.value * m.weight for m in found) / sum(m.weight for m in found)


def test_two_sites_learn_what_is_preferred(tmp_path: Path) -> None:
    with ExitStack() as stack:
        server = stack.enter_context(ServerProcess(tmp_path / "server"))
        for name in ("hospital-a", "hospital-b"):
            prompts = [f"{name}, ward {number}: is the patient well?" for number in range(60)]
            rows = [{"prompt": prompt, "chosen": "Yes.", "rejected": "I will not say."} for prompt in prompts]
            path = tmp_path / f"{name}.jsonl"
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
            stack.enter_context(SiteProcess(server, tmp_path / name, path))
        commits = list(await_done(server, submit(server, PLAN)).commits)
    assert _measured(commits[0], "loss") == pytest.approx(math.log(2), rel=1e-3)
    assert _measured(commits[-1], "loss") < 0.4
    assert _measured(commits[-1], "reward_accuracy") > 0.9


@pytest.mark.parametrize("kind", ["lora", "prompt"])
async def test_two_ranks_learn_what_one_does(kind: str, tmp_path: Path, extensions: Path, tiny_model: Path) -> None:
    rows = tmp_path / "pairs.jsonl"
    pairs = [{"prompt": f"{n}=", "chosen": "yes" * (1 + n % 2), "rejected": "no" * (1 + n % 3)} for n in range(24)]
    rows.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    train = {"steps": 2, "batch_size": 5, "micro_batch_size": 2, "optimizer": "sgd", "learning_rate": 0.5}
    settings, base, delta = (tmp_path / name for name in ("ds.json", "0.safetensors", "delta.safetensors"))
    found = []
    for ranks, stage in ((1, 2), (2, 2), (2, 3)):
        settings.write_text(
            json.dumps({"zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0}})
        )
        plan = PLAN | {
            "model": {"name": "tiny"},
            "adapter": {"kind": kind, "rank": 3, "virtual_tokens": 4},
            "train": {**train, "precision": "fp32"},
            "data": {**PLAN["data"], "template": "plain", "max_length": 24},
        }
        state = tmp_path / f"state-{ranks}-{stage}"
        state.mkdir()
        one = Trainer(state, ranks=ranks, threads=1, extensions=extensions)
        try:
            order = {
                "run_id": "r",
                "plan": Plan.model_validate(plan),
                "model": tiny_model,
                "data": rows,
                "role": "site",
            }
            await one.run(Prepare.model_validate({**order, "deepspeed_config": settings}))
            if ranks == 1:
                await one.run(Build(adapter=base))
            # Five pairs a step, two a pass: the ranks' shares differ, and one pass is idle.
            trained = await one.run(Train(round=1, base=base, delta=delta))
            found.append((load_file(delta), trained, await one.run(Evaluate(adapter=base))))
        finally:
            await one.stop(grace=1)
    (alone, trained_alone, measured_alone), *others = found
    assert max(abs(alone[name]).max() for name in alone) > 1e-4
    for shared, trained_shared, measured_shared in others:
        assert max(abs(alone[name] - shared[name]).max() for name in alone) < 2e-6
        assert trained_alone.counts == trained_shared.counts
        assert trained_alone.metrics["train_loss"] == pytest.approx(trained_shared.metrics["train_loss"], rel=1e-5)
        assert measured_alone.counts == measured_shared.counts
        assert measured_alone.metrics["loss"] == pytest.approx(measured_shared.metrics["loss"], rel=1e-5)
