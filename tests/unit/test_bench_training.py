"""What the training benchmark compares: the same examples on both sides, and a section that leaves the rest alone."""

from pathlib import Path

import pytest

from fsllm_bench.training import report, rows
from fsllm_bench.training import setting as settings
from fsllm_bench.training.overhead import Overhead
from fsllm_bench.training.setting import Setting
from fsllm_bench.training.throughput import Compared, Side
from fsllm_client.data.batches import TrainingBatches, steps_in_round
from fsllm_client.data.packing import arrange
from fsllm_client.data.site_data import load_site_data
from fsllm_client.trainer.base_model import load_tokenizer
from fsllm_common.errors import DataInvalid, InputError

pytestmark = pytest.mark.slow


@pytest.fixture
def setting(tmp_path: Path, tiny_model: Path) -> Setting:
    return settings.make(tiny_model, None, tmp_path, examples=40, batch=8, passes=3, seed=4, precision="fp32")


def test_the_made_rows_are_right_and_of_mixed_lengths() -> None:
    made = rows.make(300, 1)
    assert made == rows.make(300, 1)
    assert made != rows.make(300, 2)
    assert max(len(row["output"].splitlines()) for row in rows.make(300, 1, 6)) == 7
    for row in made:
        *steps, last = row["output"].splitlines()
        for step in steps:
            left, _, result = step.partition(" = ")
            a, sign, b = left.split()
            assert int(result) == int(a) + (int(b) if sign == "+" else -int(b))
            assert int(result) >= 0
        assert last == f"#### {steps[-1].split()[-1]}"
    lengths = sorted(len(row["input"] + row["output"]) for row in made)
    assert lengths[270] > 4 * lengths[30]


def test_a_pass_of_the_client_holds_every_example_once(setting: Setting, tiny_model: Path) -> None:
    plan = setting.plan
    train = load_site_data(setting.data, plan, load_tokenizer(tiny_model), "site").train
    packed = arrange(train, packed=True, max_length=plan.data.max_length, seed=plan.seed)
    assert steps_in_round(plan.train, len(packed)) == setting.steps
    batches = TrainingBatches(
        packed, packed=True, batch_size=plan.train.batch_size, pad=2, seed=plan.seed, round_number=1
    )
    steps = [step for step, _ in zip(batches, range(setting.steps), strict=False)]
    assert sum(step.examples for step in steps) == setting.examples == len(train)
    assert sum(step.answer_tokens for step in steps) == setting.answer_tokens
    assert setting.tokens <= setting.packed_tokens
    assert setting.tokens < setting.padded_tokens
    assert (setting.steps - 1) * setting.examples_a_step < setting.examples
    assert setting.examples <= setting.steps * setting.examples_a_step


def test_too_few_rows_are_refused(tmp_path: Path, tiny_model: Path) -> None:
    few = tmp_path / "few.jsonl"
    few.write_text('{"instruction": "a", "output": "b"}\n')
    with pytest.raises(DataInvalid, match="too few"):
        settings.make(tiny_model, few, tmp_path, examples=40, batch=8, passes=2, seed=0, precision="fp32")


def test_the_section_is_written_between_its_markers_and_nowhere_else(tmp_path: Path, setting: Setting) -> None:
    compared = Compared(
        Side([[3.0, 2.0], [3.0, 2.2]], [2.0, 1.0, 4.0]), Side([[3.0, 2.1], [3.0, 1.9]], [4.0, 5.0, 3.0])
    )
    overhead = Overhead([0.2, 0.4, 0.3], [0.1, 0.1, 0.5], 4, [1, 1], [1, 1])
    assert compared.ratio == 2.0
    path = tmp_path / "performance.md"
    path.write_text("# Before\n\nkept\n")
    report.write_section(path, setting, compared, overhead, "python -m something")
    once = path.read_text()
    assert once.startswith("# Before\n\nkept\n")
    assert "| 2.00 |" in once
    # By hand: means of 2.1 and 2.0; variances of 0.02 each over two orders, so a standard error of 0.1414.
    assert "loss is 5.0% above the Trainer's (means over the orders), with a standard error of 7.1%: no more" in once
    path.write_text(f"{once}\nafter, kept\n")
    report.write_section(path, setting, compared, None, "another command")
    twice = path.read_text()
    assert twice.startswith("# Before\n\nkept\n")
    assert twice.endswith("\nafter, kept\n")
    assert "another command" in twice
    assert "python -m something" not in twice
    path.write_text(twice.replace(report.END, ""))
    with pytest.raises(InputError):
        report.write_section(path, setting, compared, None, "x")


def test_losses_that_differ_by_more_than_their_orders_are_called_different(tmp_path: Path, setting: Setting) -> None:
    compared = Compared(Side([[3.0, 2.0], [3.0, 2.02]], [1.0]), Side([[3.0, 2.2], [3.0, 2.22]], [1.0]))
    path = tmp_path / "performance.md"
    report.write_section(path, setting, compared, None, "python -m something")
    assert "9.0% below the Trainer's" in path.read_text()
    assert ": more than the order" in path.read_text()
