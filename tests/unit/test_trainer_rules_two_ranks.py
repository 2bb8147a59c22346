"""Each method's client half against its paper's loop in plain torch: two ranks, ZeRO 2 and 3."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from rules_check import assert_as_papers, rules_spec

from fsllm_client.trainer.launch import environment

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.mark.parametrize("stage", [2, 3])
def test_two_rounds_of_each_method_are_its_papers(
    stage: int, extensions: Path, tmp_path: Path, tiny_model: Path, tiny_rows: Path
) -> None:
    file = tmp_path / "spec.json"
    file.write_text(json.dumps(rules_spec(tmp_path, tiny_model, tiny_rows, stage)))
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"),
        *("--nproc-per-node", "2", str(Path(__file__).parent / "rules_site.py"), str(file)),
    ]
    env = environment(extensions=extensions, ranks=2, threads=1, gpu=False)
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_as_papers(tmp_path, tiny_model, tiny_rows)
