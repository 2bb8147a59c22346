"""A site's own model: what a method makes of a version and of what the site keeps, and where its adapter is left."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from fsllm_client.site import own_adapter
from fsllm_client.trainer.adapters import config_json
from fsllm_client.trainer.tensor_files import write_tensors
from fsllm_common.algorithms import LocalRule, local_rule

if TYPE_CHECKING:
    import torch
    from peft import PeftModel

    from fsllm_client.trainer.kept import Private
    from fsllm_common.plan import Plan

    Tensors = Mapping[str, torch.Tensor]


def own_model(plan: Plan, version: int, base: Tensors, extra: Tensors, private: Private) -> tuple[LocalRule, Tensors]:
    """Return the rule that has made the model, for its forward pass, and the adapter: the version's, for most methods.

    Args:
        plan: The run's plan.
        version: The version's number.
        base: Its adapter.
        extra: Its other tensors.
        private: What the site keeps.

    """
    rule = local_rule(plan)
    rule.private.update(private.rule)
    rule.round = version + 1
    return rule, rule.evaluated({**base, **private.own}, extra)


def leave_adapter(
    folder: Path, plan: Plan, model: PeftModel, adapter: Tensors, rule: LocalRule, *, version: int, round_number: int
) -> None:
    """Leave an adapter in the private folder for ``own_adapter.export_own``, with what the rule mixes it with.

    Raises:
        Unavailable: DISK_FULL, DISK_FAILED.

    """
    facts = own_adapter.facts(config_json(plan, model), version, round_number)
    write_tensors(folder / own_adapter.FILE, {**adapter, **rule.beside()}, facts)
