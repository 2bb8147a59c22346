"""Every kind of adapter, federated for real: two daemons train the embedded model, and plain PEFT loads the result."""

import importlib.util
import json
import os
import subprocess
import sysconfig
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import pytest
from tests.system.harness import ServerProcess
from tests.system.plain_peft import measure, validation
from tests.system.runs import await_done, submit
from tests.system.site_process import SiteProcess

from fsllm.v1.control_pb2 import Commit
from fsllm_bench.embedded.tasks import write_federation
from fsllm_common.plan.combinations import PROMPT_KINDS
from fsllm_common.plan.schema import AdapterKind

# transformers and PEFT warn of each other.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

RATES = {"ia3": 0.1, "vera": 0.05, "lora-xs": 0.02, "oft": 0.005, "prompt": 0.05, "prefix": 0.05}
"""One round of a few steps must show; kinds of few parameters need large ones."""

needs_bitsandbytes = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="no bitsandbytes")


@dataclass
class Federation:
    server: ServerProcess
    rows: dict[str, Path]

    def run(self, plan: dict[str, Any]) -> list[Commit]:
        return list(await_done(self.server, submit(self.server, plan)).commits)

    def export(self, run: str, folder: Path) -> None:
        subprocess.run(
            [f"{sysconfig.get_path('scripts')}/fsllm", "run", "export", run, "-o", str(folder)],
            env=os.environ | {"FSLLM_STATE_DIR": str(self.server.state)},
            capture_output=True,
            check=True,
        )


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    folder = tmp_path_factory.mktemp("adapters")
    files = write_federation(folder / "data", 0)
    rows = {}
    with ExitStack() as stack:
        server = stack.enter_context(ServerProcess(folder / "server"))
        for name in ("hospital-a", "hospital-b"):
            rows[name] = folder / f"{name}.jsonl"
            rows[name].write_text("".join(files.train[name].read_text().splitlines(keepends=True)[:80]))
            stack.enter_context(SiteProcess(server, folder / name, rows[name]))
        yield Federation(server, rows)


def _plan(kind: str, **model: str) -> dict[str, Any]:
    return {
        "name": "-".join([kind, *model.values()]),
        "seed": 3,
        "rounds": 1,
        "model": {"name": "embedded", **model},
        "adapter": {"kind": kind, "rank": 8, "virtual_tokens": 8, "encoder_hidden_size": 32},
        "timing": {"gather_seconds": 0.1},
        "train": {"steps": 4, "batch_size": 8, "learning_rate": RATES.get(kind, 0.01), "precision": "fp32"},
        "data": {"template": "brief", "max_length": 96, "packing": kind not in PROMPT_KINDS},
        "wire": {"element_type": "fp32"},
        "evaluate": {"metrics": ["loss"], "limit": 8},
    }


def _loss(commit: Commit) -> float:
    """Return the mean loss over both sites' answer tokens."""
    found = [metric for member in commit.metrics for metric in member.metrics if metric.name == "loss"]
    assert len(found) == 2
    return sum(m.value * m.weight for m in found) / sum(m.weight for m in found)


@pytest.mark.parametrize("kind", get_args(AdapterKind))
def test_a_kind_is_federated_and_plain_peft_gives_the_loss_that_the_sites_reported(
    kind: str, federation: Federation, tmp_path: Path
) -> None:
    plan = _plan(kind)
    before, after = federation.run(plan)
    assert len(after.contributions) == 2
    assert _loss(after) < _loss(before) - 1e-3
    federation.export(str(plan["name"]), tmp_path / "adapter")
    examples = [one for rows in federation.rows.values() for one in validation(rows, plan)]
    assert measure(tmp_path / "adapter", examples) == pytest.approx(_loss(after), rel=1e-4)
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert not [key for key in settings if key.startswith("fsllm")]


@needs_bitsandbytes
@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_quantised_base_is_federated(quantization: str, federation: Federation) -> None:
    before, after = federation.run(_plan("lora", quantization=quantization))
    plain, _ = federation.run(_plan("lora") | {"name": f"beside-{quantization}"})
    assert _loss(after) < _loss(before) - 1e-3
    assert _loss(before) != _loss(plain), "the base was not quantised"
    assert _loss(before) == pytest.approx(_loss(plain), rel=0.5)
