"""What a rank does with its orders: one run's model, data and engine, prepared once and used by every round."""

from __future__ import annotations

import contextlib
import gc
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fsllm_client.trainer import optimizer_state
from fsllm_client.trainer.account import epsilon
from fsllm_client.trainer.adapters import adapter_parameters, attach, initial_adapter
from fsllm_client.trainer.attention import attend_by_blocks
from fsllm_client.trainer.base_model import check_folder, load_model, load_tokenizer, shape_of_model, vocabulary
from fsllm_client.trainer.cpu_adam import build
from fsllm_client.trainer.ds_config import deepspeed_config, ignored_keys, micro_batches, site_config
from fsllm_client.trainer.loop import changes, train_round
from fsllm_client.trainer.orders import Account, Advanced, Build, Evaluate, Finished, Prepare, Train
from fsllm_client.trainer.tensor_files import read_tensors, write_tensors
from fsllm_common.algorithms import local_rule
from fsllm_common.errors import FsllmError, PlanInvalid, TrainingFailed

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from fsllm_client.data.batches import Row
    from fsllm_client.data.site_data import SiteData
    from fsllm_client.trainer.engine import Engine
    from fsllm_client.trainer.group import Group

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Run:
    """What ``Prepare`` leaves."""

    order: Prepare
    engine: Engine
    tokenizer: PreTrainedTokenizerBase
    data: SiteData
    sequences: list[Row]
    packed: bool
    kept: tuple[Path, int] | None = None
    """The private folder and the round after which the optimizer's state was kept just now."""
    ahead: tuple[Path, int] | None = None
    """The private folder and the round for which the engine holds the optimizer's kept state already."""


class Session:
    """Carries out orders, on every rank of the group alike.

    Args:
        group: Makes or returns this rank's place in the group; first called when torch is needed.
        advanced: Takes reports of progress; only rank 0's are sent.
        cancelled: Tells whether the daemon has given up the order in hand.

    """

    def __init__(
        self, group: Callable[[], Group], advanced: Callable[[Advanced], None], cancelled: Callable[[], bool]
    ) -> None:
        self._group = group
        self._advanced = advanced
        self._cancelled = cancelled
        self._run: _Run | None = None

    def carry_out(self, order: Prepare | Build | Train | Evaluate | Account) -> Finished:
        """Do what the order says.

        Raises:
            FsllmError: It can not be done, for a cause that is known.

        """
        match order:
            case Prepare():
                return self._prepare(order)
            case Build():
                return self._build(order)
            case Train():
                return self._train(order)
            case Evaluate():
                return self._evaluate(order)
            case Account():
                return Finished(metrics={"epsilon": epsilon(order.multiplier, order.releases, order.delta)})

    # Prepare.

    def _prepare(self, order: Prepare) -> Finished:
        if self._run is not None:
            self._run.engine.close()
            self._run = None
            gc.collect()  # an engine and its model refer to each other
        plan = order.plan
        check_folder(order.model)
        site = site_config(order.deepspeed_config) if order.deepspeed_config is not None else None
        tokenizer = load_tokenizer(order.model)
        self._advanced(Advanced(activity="reading", done=0, total=0))

        from fsllm_client.data.site_data import load_site_data

        def reading(done: int, total: int) -> None:
            self._advanced(Advanced(activity="reading", done=done, total=total))

        data = load_site_data(order.data, plan, tokenizer, order.role, reading)
        self._advanced(Advanced(activity="loading", done=0, total=2))
        group = self._group()
        engine = self._load_engine(order, site, group)
        self._advanced(Advanced(activity="loading", done=1, total=2))
        packed, sequences, notes = _sequences(order, data, engine)
        self._run = _Run(order, engine, tokenizer, data, sequences, packed)
        if site and (ignored := ignored_keys(site)):
            notes.append(f"{order.deepspeed_config}: {', '.join(ignored)} have no effect: they belong to the plan")
        self._advanced(Advanced(activity="loading", done=2, total=2))
        parameters = sum(_elements(parameter) for parameter in engine.parameters.values())
        return Finished(
            counts={**data.counts, "sequences": len(sequences), "parameters": parameters, "ranks": group.world},
            notes=(*data.notes, *notes),
        )

    def _load_engine(self, order: Prepare, site: Mapping[str, Any] | None, group: Group) -> Engine:
        import torch

        from fsllm_client.trainer.engine import Engine

        plan = order.plan
        rule = local_rule(plan)
        config = deepspeed_config(
            plan,
            world=group.world,
            device="cuda" if group.device.type == "cuda" else "cpu",
            clip=not changes(rule, "after_backward"),
            site=dict(site) if site is not None else None,
        )
        if config["zero_optimization"].get("offload_optimizer") and plan.train.optimizer == "adamw":
            build()
        dtype = torch.bfloat16 if plan.train.precision == "bf16" else torch.float32
        with _announced(config):
            base = load_model(order.model, dtype)
            attend_by_blocks(base, group.device)
            model = attach(plan, base)
        return Engine(model, adapter_parameters(model), plan, config, group.device)

    # The other orders.

    def _build(self, order: Build) -> Finished:
        run = self._prepared()
        if self._group().rank != 0:
            return Finished()
        import torch

        self._advanced(Advanced(activity="building", done=0, total=1))
        plan, folder = run.order.plan, run.order.model
        # Only DoRA's first version depends on the base model's weights.
        model = load_model(folder, torch.float32) if plan.adapter.kind == "dora" else shape_of_model(folder)
        tensors, config = initial_adapter(plan, model)
        write_tensors(order.adapter, tensors, {"adapter_config": config})
        self._advanced(Advanced(activity="building", done=1, total=1))
        return Finished(counts={"parameters": sum(tensor.numel() for tensor in tensors.values())})

    def _train(self, order: Train) -> Finished:
        from fsllm_client.data.batches import TrainingBatches, steps_in_round
        from fsllm_client.data.tokenise import special_ids

        run, group = self._prepared(), self._group()
        plan = run.order.plan
        if not run.sequences:
            raise PlanInvalid("an evaluator has no training data, and was told to train")
        kept = order.resume if plan.train.optimizer_state == "keep" else None
        if kept is None:
            run.engine.reset_optimizer()
        elif run.ahead != (kept, order.round):
            optimizer_state.load_before(kept, order.round, run.engine)
        run.kept = run.ahead = None
        batches = TrainingBatches(
            run.sequences,
            packed=run.packed,
            batch_size=plan.train.batch_size,
            micro_batch_size=micro_batches(plan, group.world)[0],
            pad=special_ids(run.tokenizer).pad,
            seed=plan.seed,
            round_number=order.round,
            rank=group.rank,
            world=group.world,
        )

        def progress(done: int, total: int, metrics: Mapping[str, float]) -> None:
            self._advanced(Advanced(activity="training", done=done, total=total, metrics=dict(metrics)))

        trained = train_round(
            run.engine,
            batches,
            round_number=order.round,
            steps=steps_in_round(plan.train, len(run.sequences)),
            base=self._read_adapter(order.base, run.engine),
            rule=local_rule(plan),
            group=group,
            progress=progress,
            cancelled=self._cancelled,
        )
        if kept is not None:
            # Before the delta: once that is delivered, the next round must start from this state and from no other.
            optimizer_state.save(kept, order.round, run.engine, writes=group.rank == 0)
            group.total(0.0)  # no rank goes on before the file is there
        if group.rank == 0:
            # Not synced: the daemon syncs what it makes of it, and a crash before that has the round trained again.
            write_tensors(order.delta, trained.delta, durable=False)
        run.kept = (kept, order.round) if kept is not None else None
        counts = {"examples": len(run.data.train), "tokens": trained.tokens, "steps": trained.steps}
        return Finished(counts=counts, metrics=trained.metrics)

    def look_ahead(self) -> None:
        """Do now, while the round is gathered and evaluated, what the next one would else begin with.

        Only a kept optimizer has anything to do: its state is set as it would be by a worker that was started anew, so
        that a round gives the same bits in both. Nothing waits for this but the next order.
        """
        run = self._run
        if run is None or run.kept is None:
            return
        (folder, number), run.kept = run.kept, None
        optimizer_state.load_before(folder, number + 1, run.engine)
        run.ahead = (folder, number + 1)

    def _evaluate(self, order: Evaluate) -> Finished:
        from fsllm_client.trainer.evaluate import evaluate

        run, group = self._prepared(), self._group()
        began = time.monotonic()
        run.engine.write_adapter(self._read_adapter(order.adapter, run.engine))
        measured = evaluate(
            run.engine.model,
            run.engine.answers,
            run.tokenizer,
            run.data.validation,
            run.order.plan,
            group,
            batch_size=micro_batches(run.order.plan, group.world)[0],
            progress=lambda done, total: self._advanced(Advanced(activity="evaluating", done=done, total=total)),
            cancelled=self._cancelled,
        )
        return Finished(counts=measured.counts, metrics={**measured.metrics, "seconds": time.monotonic() - began})

    def _prepared(self) -> _Run:
        if self._run is None:
            raise TrainingFailed("INTERNAL", "the worker was given an order before it was prepared")
        return self._run

    @staticmethod
    def _read_adapter(path: Any, engine: Engine) -> dict[str, torch.Tensor]:  # noqa: ANN401
        tensors = read_tensors(path)
        expected = {name: _shape(parameter) for name, parameter in engine.parameters.items()}
        found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if found != expected:
            differing = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
            raise FsllmError(
                "MANIFEST_INVALID",
                f"{path} does not fit this site's adapter: {len(differing)} tensors differ, e.g. {differing[0]}, which "
                f"is {found.get(differing[0], 'absent')} and should be {expected.get(differing[0], 'absent')}",
                cure="The sites' base models or libraries differ: compare model folders and versions.",
            )
        return tensors


@contextlib.contextmanager
def _announced(config: dict[str, Any]) -> Iterator[None]:
    """Under ZeRO-3, have transformers cut up each weight as it is read, and PEFT gather those it looks at."""
    if config["zero_optimization"]["stage"] < 3:
        yield
        return
    from transformers.integrations import HfDeepSpeedConfig, unset_hf_deepspeed_config

    announced = HfDeepSpeedConfig(config)  # it holds for as long as it lives
    try:
        yield
    finally:
        # Or the model that builds an adapter's first version would be cut up too.
        unset_hf_deepspeed_config()
        del announced


def _sequences(order: Prepare, data: SiteData, engine: Engine) -> tuple[bool, list[Row], list[str]]:
    from fsllm_client.data.packing import adapter_allows_packing, arrange, keeps_examples_apart

    plan = order.plan
    notes: list[str] = []
    engine.model.eval()
    if not engine.answers.check(engine.model, vocabulary(engine.model), engine.device):
        notes.append("this model's logits are computed for every token: they can not be had for the answers alone")
    packed = plan.data.packing and order.role == "site"
    if packed and not adapter_allows_packing(plan.adapter.kind):
        packed = False
        notes.append(f"sequences are not packed: only the first example of each would see the {plan.adapter.kind}")
    if packed and not keeps_examples_apart(engine.model, vocabulary(engine.model), engine.device):
        packed = False
        notes.append("sequences are not packed: this model does not keep the examples of one apart")
    sequences = arrange(data.train, packed=packed, max_length=plan.data.max_length, seed=plan.seed)
    return packed, sequences, notes


def _shape(parameter: torch.nn.Parameter) -> tuple[int, ...]:
    """Return the whole shape of a parameter, which under ZeRO-3 is not its own."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _elements(parameter: torch.nn.Parameter) -> int:
    return int(getattr(parameter, "ds_numel", parameter.numel()))
