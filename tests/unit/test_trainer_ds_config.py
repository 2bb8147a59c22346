import json
from pathlib import Path
from typing import Any

import pytest

from fsllm_client.trainer.ds_config import deepspeed_config, ignored_keys, micro_batches, site_config
from fsllm_common.errors import SettingsInvalid
from fsllm_common.plan import Plan


def _plan(train: dict[str, Any] | None = None, **deepspeed: object) -> Plan:
    return Plan.model_validate({"name": "t", "model": {"name": "m"}, "train": train or {}, "deepspeed": deepspeed})


@pytest.mark.parametrize(
    ("batch", "micro", "world", "expected"),
    [
        (16, None, 1, (16, 1)),
        (16, 4, 1, (4, 4)),
        (16, 4, 2, (4, 2)),
        (16, 4, 3, (4, 2)),
        (2, 2, 4, (1, 1)),
        (6, 4, 1, (4, 2)),
    ],
)
def test_every_sequence_of_a_step_has_a_place(
    batch: int, micro: int | None, world: int, expected: tuple[int, int]
) -> None:
    size, passes = micro_batches(_plan({"batch_size": batch, "micro_batch_size": micro}), world)
    assert (size, passes) == expected
    assert size * passes * world >= batch


def test_without_a_gpu_the_optimizer_is_always_offloaded() -> None:
    plan = _plan(offload_optimizer=False)
    assert "offload_optimizer" not in deepspeed_config(plan, world=1, device="cuda", clip=True)["zero_optimization"]
    on_cpu = deepspeed_config(plan, world=1, device="cpu", clip=True)
    assert on_cpu["zero_optimization"]["offload_optimizer"] == {"device": "cpu"}


def test_parameters_are_offloaded_in_stage_3() -> None:
    config = deepspeed_config(_plan(zero_stage=3, offload_parameters=True), world=1, device="cuda", clip=True)
    assert config["zero_optimization"]["offload_param"] == {"device": "cpu"}


def test_the_sites_json_replaces_deepspeeds_part_and_not_the_plans(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    given = {
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "train_batch_size": 999,
        "gradient_accumulation_steps": 7,
        "fp16": {"enabled": True},
        "optimizer": {"type": "Adam", "params": {"lr": 1}},
        "comms_logger": {"enabled": True},
    }
    path.write_text(json.dumps(given))
    site = site_config(path)
    plan = _plan({"batch_size": 8, "micro_batch_size": 2, "precision": "bf16", "max_grad_norm": 0.5}, zero_stage=1)

    config = deepspeed_config(plan, world=2, device="cuda", clip=True, site=site)

    assert config["zero_optimization"] == given["zero_optimization"]
    assert config["comms_logger"] == {"enabled": True}
    assert (config["train_micro_batch_size_per_gpu"], config["gradient_accumulation_steps"]) == (2, 2)
    assert config["bf16"] == {"enabled": True}
    assert config["gradient_clipping"] == 0.5
    assert not {"train_batch_size", "fp16", "optimizer"} & config.keys()
    assert set(ignored_keys(site)) == {"train_batch_size", "gradient_accumulation_steps", "fp16", "optimizer"}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "not JSON"),
        ("[]", "object"),
        ("{}", "must be 1, 2 or 3"),
        ('{"zero_optimization": {"stage": 0}}', "must be 1, 2 or 3"),
        ('{"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}}', "none or cpu"),
    ],
)
def test_a_json_that_can_not_serve_is_refused_by_name(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "ds.json"
    path.write_text(text)
    with pytest.raises(SettingsInvalid, match=says) as caught:
        site_config(path)
    assert str(path) in caught.value.message


def test_an_absent_json_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsInvalid, match="No such file"):
        site_config(tmp_path / "absent.json")
