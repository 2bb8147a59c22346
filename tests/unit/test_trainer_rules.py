"""Each method's client half against its paper's loop in plain torch: one process, ZeRO 2 and 3."""

from pathlib import Path

import pytest
from rules_check import assert_as_papers, rules_spec
from rules_site import train_all

from fsllm_client.trainer.group import Group

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.mark.parametrize("stage", [2, 3])
def test_two_rounds_of_each_method_are_its_papers(
    stage: int, alone: Group, tmp_path: Path, tiny_model: Path, tiny_rows: Path
) -> None:
    train_all(rules_spec(tmp_path, tiny_model, tiny_rows, stage), alone)
    assert_as_papers(tmp_path, tiny_model, tiny_rows)
