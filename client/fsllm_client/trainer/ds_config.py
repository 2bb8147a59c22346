"""DeepSpeed's configuration: from the plan's sections, or with the site's own JSON in place of the ``deepspeed`` one.

Whatever the site's JSON says, what the sites of a federation must agree on stays the plan's: batch size, optimizer,
learning rate, clipping and precision.
"""

import json
import math
from pathlib import Path
from typing import Any, Final, Literal

from fsllm_common.errors import SettingsInvalid
from fsllm_common.plan import Plan

_THE_PLANS: Final = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "optimizer",
    "scheduler",
    "fp16",
    "bf16",
    "amp",
    "prescale_gradients",
    "gradient_predivide_factor",
)
"""Keys of a site's JSON that have no effect, for they belong to the plan."""

_BUCKET: Final = 20_000_000
"""Elements. Adapters are small; DeepSpeed's default of 5e8 reserves gigabytes for them."""


def micro_batches(plan: Plan, world: int) -> tuple[int, int]:
    """Return the sequences of one forward pass and the number of passes in a step, on each of ``world`` ranks.

    When the batch does not divide, some ranks get fewer sequences or an empty pass: the loss is weighted by tokens over
    the whole step, so the result is the same.
    """
    share = math.ceil(plan.train.batch_size / world)
    size = min(plan.train.micro_batch_size or share, share)
    return size, math.ceil(share / size)


def site_config(path: Path) -> dict[str, Any]:
    """Read a site's own DeepSpeed JSON.

    Raises:
        SettingsInvalid: It can not be read, is no JSON object, or asks for what the trainer can not do.

    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsInvalid(f"deepspeed_config: can not read {path}: {error.strerror}") from error
    except ValueError as error:
        raise SettingsInvalid(f"deepspeed_config: {path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise SettingsInvalid(f"deepspeed_config: {path} must hold a JSON object")
    zero = config.get("zero_optimization", {})
    if not isinstance(zero, dict) or zero.get("stage", 0) not in (1, 2, 3):
        raise SettingsInvalid(f"deepspeed_config: {path}: zero_optimization.stage must be 1, 2 or 3")
    for key in ("offload_optimizer", "offload_param"):
        if (zero.get(key) or {}).get("device", "none") not in ("none", "cpu"):
            raise SettingsInvalid(f"deepspeed_config: {path}: zero_optimization.{key}.device must be none or cpu")
    return config


def deepspeed_config(
    plan: Plan, *, world: int, device: Literal["cpu", "cuda"], clip: bool, site: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Return what ``deepspeed.initialize`` takes.

    Args:
        plan: The run's plan.
        world: How many ranks train together.
        device: Without a GPU the optimizer is always offloaded: the other Adam there is slow and compiled anew.
        clip: Whether DeepSpeed clips the gradient. A rule that changes gradients after the backward pass needs the
            trainer to clip, since with offload DeepSpeed takes the norm during the backward pass.
        site: The site's own JSON (``site_config``), replacing the plan's ``deepspeed`` section.

    """
    size, passes = micro_batches(plan, world)
    config = {key: value for key, value in (site or {}).items() if key not in _THE_PLANS}
    zero = dict(config["zero_optimization"]) if site is not None else _zero(plan)
    if device == "cpu":
        zero["offload_optimizer"] = {"device": "cpu"}
    config.update(
        train_micro_batch_size_per_gpu=size,
        gradient_accumulation_steps=passes,
        gradient_clipping=plan.train.max_grad_norm if clip else 0.0,
        bf16={"enabled": plan.train.precision == "bf16"},
        zero_optimization=zero,
        # SGD is torch's own, which DeepSpeed calls untested, and slow when offloaded: for an adapter it is neither.
        zero_allow_untested_optimizer=True,
        zero_force_ds_cpu_optimizer=False,
    )
    config.setdefault("steps_per_print", 2**31)
    return config


def ignored_keys(site: dict[str, Any]) -> tuple[str, ...]:
    """Return the keys of a site's JSON that have no effect, for the log."""
    return tuple(key for key in _THE_PLANS if key in site)


def _zero(plan: Plan) -> dict[str, Any]:
    asked = plan.deepspeed
    zero: dict[str, Any] = {"stage": asked.zero_stage, "reduce_bucket_size": _BUCKET, "allgather_bucket_size": _BUCKET}
    if asked.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    if asked.zero_stage == 3:
        zero["stage3_prefetch_bucket_size"] = _BUCKET
        if asked.offload_parameters:
            zero["offload_param"] = {"device": "cpu"}
    return zero
