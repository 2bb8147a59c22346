"""What a rank does with its orders: one run's model, data and engine, prepared once and used by every round."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fsllm_client.trainer.account import epsilon
from fsllm_client.trainer.adapters import WEIGHT_KINDS, adapter_parameters, attach, initial_adapter
from fsllm_client.trainer.attention import attend_by_blocks
from fsllm_client.trainer.base_delta import BaseDelta
from fsllm_client.trainer.base_model import check_folder, load_model, load_tokenizer, shape_of_model, vocabulary
from fsllm_client.trainer.cpu_adam import build
from fsllm_client.trainer.ds_config import deepspeed_config, ignored_keys, micro_batches, site_config
from fsllm_client.trainer.kept import OPTIMIZER, PRIVATE, Kept, Private
from fsllm_client.trainer.loop import train_round
from fsllm_client.trainer.orders import Account, Advanced, Build, Evaluate, Finished, Prepare, Train
from fsllm_client.trainer.own_model import leave_adapter, own_model
from fsllm_client.trainer.sharing import Sharing
from fsllm_client.trainer.tensor_files import read_tensors, write_tensors
from fsllm_common.algorithms import LocalRule, changes, local_rule
from fsllm_common.errors import DataInvalid, FsllmError, PlanInvalid, TrainingFailed

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from fsllm_client.data.batches import Row
    from fsllm_client.data.site_data import SiteData
    from fsllm_client.trainer.engine import Engine
    from fsllm_client.trainer.evaluate import Evaluation
    from fsllm_client.trainer.group import Group

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Run:
    """What ``Prepare`` leaves."""

    order: Prepare
    engine: Engine
    base_delta: BaseDelta
    sharing: Sharing
    tokenizer: PreTrainedTokenizerBase
    data: SiteData
    sequences: list[Row]
    packed: bool
    number: int
    """``LocalRule.site``."""
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
        if order.role == "site" and local_rule(plan).validates and not data.validation:
            raise DataInvalid(
                f"{order.data}: none of its rows fell to validation, and {plan.algorithm.name} measures there what "
                "training was worth",
                cure="Raise data.validation_fraction, or add rows.",
            )
        self._advanced(Advanced(activity="loading", done=0, total=2))
        group = self._group()
        engine, sharing = self._load_engine(order, site, group)
        self._advanced(Advanced(activity="loading", done=1, total=2))
        packed, sequences, notes = _sequences(order, data, engine)
        base_delta = BaseDelta(engine.model, group.device)
        self._run = _Run(order, engine, base_delta, sharing, tokenizer, data, sequences, packed, _number(data))
        if site and (ignored := ignored_keys(site)):
            notes.append(f"{order.deepspeed_config}: {', '.join(ignored)} have no effect: they belong to the plan")
        self._advanced(Advanced(activity="loading", done=2, total=2))
        parameters = sum(_elements(parameter) for parameter in engine.parameters.values())
        return Finished(
            counts={**data.counts, "sequences": len(sequences), "parameters": parameters, "ranks": group.world},
            notes=(*data.notes, *notes),
        )

    def _load_engine(self, order: Prepare, site: Mapping[str, Any] | None, group: Group) -> tuple[Engine, Sharing]:
        import torch

        from fsllm_client.trainer.engine import Engine

        plan = order.plan
        dtype = torch.bfloat16 if plan.train.precision == "bf16" else torch.float32

        def config(*, clip: bool) -> dict[str, Any]:
            device: Literal["cpu", "cuda"] = "cuda" if group.device.type == "cuda" else "cpu"
            return deepspeed_config(
                plan, world=group.world, device=device, clip=clip, site=dict(site) if site is not None else None
            )

        whole = config(clip=True)
        if whole["zero_optimization"].get("offload_optimizer") and plan.train.optimizer == "adamw":
            build()
        with _announced(whole):
            base = load_model(order.model, dtype, plan.model.quantization, group.device)
            attend_by_blocks(base, group.device)
            model = attach(plan, base)
        parameters = adapter_parameters(model)
        sharing = Sharing(plan, parameters)
        rule = local_rule(plan)
        # Else the norm is not that of the gradient which the backward pass leaves.
        clip = not (sharing.alternates or changes(rule, "after_backward") or changes(rule, "turns"))
        return Engine(model, parameters, plan, config(clip=clip), group.device, sharing.fixed), sharing

    # The other orders.

    def _build(self, order: Build) -> Finished:
        run = self._prepared()
        if self._group().rank != 0:
            return Finished()
        import torch

        self._advanced(Advanced(activity="building", done=0, total=1))
        plan, folder = run.order.plan.with_rank(order.rank), run.order.model
        # The others' first version does not depend on the base model's weights.
        whole = plan.adapter.kind in WEIGHT_KINDS
        model = load_model(folder, torch.float32) if whole else shape_of_model(folder)
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
            _load_optimizer(run.engine, kept, order.round)
        run.kept = run.ahead = None
        store = Kept(order.resume, PRIVATE) if order.resume is not None else None
        private = Private.of(store.before(order.round) if store is not None else None)
        rule = local_rule(plan)
        rule.private.update(private.rule)
        rule.site = run.number
        rule.validate = partial(self._validation_loss, run, group)
        base, extra = self._read_version(order.base, run)
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
            base={**base, **private.own},
            extra=extra,
            rule=rule,
            sharing=run.sharing,
            group=group,
            progress=progress,
            cancelled=self._cancelled,
        )
        if kept is not None:
            states = run.engine.read_optimizer()
            if group.rank == 0:
                # Before the delta: once that is delivered, the next round must start from this and from nothing else.
                Kept(kept, OPTIMIZER).save(order.round, states)
        if group.rank == 0:
            if store is not None:
                left = Private(trained.own, rule.private)
                store.save(order.round, left.tensors(), acknowledged=not rule.awaits_receipt)
                if run.sharing.leaves_adapter:
                    # Perhaps nobody measures what comes of it: the plan or the site's policy may want no evaluation.
                    _, own = own_model(plan, order.round - 1, base, extra, left)
                    model, version = run.engine.model, order.round - 1
                    leave_adapter(store.folder, plan, model, own, rule, version=version, round_number=order.round)
            # Not synced: the daemon syncs what it makes of it, and a crash before that has the round trained again.
            write_tensors(order.delta, trained.delta, durable=False)
        group.total(0.0)  # no rank goes on before the files are there
        run.kept = (kept, order.round) if kept is not None else None
        counts = {"examples": len(run.data.train), "tokens": trained.tokens, "steps": trained.steps}
        return Finished(counts=counts, metrics=trained.metrics, model_digest=rule.model_digest.hex())

    def look_ahead(self) -> None:
        """Do now, while the round is gathered and evaluated, what the next one would else begin with.

        Only a kept optimizer has anything to do: its state is set as it would be by a worker that was started anew, so
        that a round gives the same bits in both. Nothing waits for this but the next order.
        """
        run = self._run
        if run is None or run.kept is None:
            return
        (folder, number), run.kept = run.kept, None
        _load_optimizer(run.engine, folder, number + 1)
        run.ahead = (folder, number + 1)

    def _evaluate(self, order: Evaluate) -> Finished:
        run, group = self._prepared(), self._group()
        began = time.monotonic()
        rule, adapter = self._evaluated(order, run)
        run.engine.write_adapter(adapter)
        if run.sharing.leaves_adapter and order.resume is not None and order.resume.is_dir() and group.rank == 0:
            plan, model, number = run.order.plan, run.engine.model, order.version
            leave_adapter(order.resume, plan, model, adapter, rule, version=number, round_number=number)
        with rule.inside(run.engine.model, group.device):
            evaluation, rows = self._evaluation(run, group), run.data.validation
            paired = run.order.plan.data.format == "preference"
            measured = evaluation.preferences(rows, rule) if paired else evaluation.answers(rows)
        return Finished(counts=measured.counts, metrics={**measured.metrics, "seconds": time.monotonic() - began})

    def _evaluation(self, run: _Run, group: Group) -> Evaluation:
        from fsllm_client.trainer.evaluate import Evaluation

        def progress(done: int, total: int) -> None:
            self._advanced(Advanced(activity="evaluating", done=done, total=total))

        size = micro_batches(run.order.plan, group.world)[0]
        return Evaluation(run.engine, run.tokenizer, group, size, progress, self._cancelled)

    def _validation_loss(self, run: _Run, group: Group, adapter: Mapping[str, torch.Tensor]) -> float:
        run.engine.write_adapter(adapter)
        return self._evaluation(run, group).loss(run.data.validation)

    def _evaluated(self, order: Evaluate, run: _Run) -> tuple[LocalRule, Mapping[str, torch.Tensor]]:
        """Return the adapter to measure, the version's or what the method makes of it at this site, and its rule."""
        base, extra = self._read_version(order.adapter, run)
        kept = Kept(order.resume, PRIVATE).before(order.version + 1) if order.resume is not None else None
        return own_model(run.order.plan, order.version, base, extra, Private.of(kept))

    def _prepared(self) -> _Run:
        if self._run is None:
            raise TrainingFailed("INTERNAL", "the worker was given an order before it was prepared")
        return self._run

    @staticmethod
    def _read_version(path: Path, run: _Run) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Return a version's adapter and its other tensors; what it adds to the base model is applied from now on."""
        tensors = read_tensors(path)
        expected = {name: _shape(parameter) for name, parameter in run.engine.adapter.items()}
        # What a method adds has a prefix (``Algorithm.extra``); PEFT's names are dotted.
        adapter = {name: tensor for name, tensor in tensors.items() if "/" not in name}
        found = {name: tuple(tensor.shape) for name, tensor in adapter.items()}
        if found != expected:
            differing = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
            raise FsllmError(
                "MANIFEST_INVALID",
                f"{path} does not fit this site's adapter: {len(differing)} tensors differ, e.g. {differing[0]}, which "
                f"is {found.get(differing[0], 'absent')} and should be {expected.get(differing[0], 'absent')}",
                cure="The sites' base models or libraries differ: compare model folders and versions.",
            )
        extra = {name: tensor for name, tensor in tensors.items() if name not in adapter}
        run.base_delta.install(extra)
        return adapter, extra


def _load_optimizer(engine: Engine, folder: Path, round_number: int) -> None:
    """Give the engine the state that the last round before this one has left, or a fresh one."""
    states = Kept(folder, OPTIMIZER).before(round_number)
    if states is None:
        engine.reset_optimizer()
    else:
        engine.write_optimizer(states)


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


def _number(data: SiteData) -> int:
    """Return a number that stands for a site's training examples."""
    found = hashlib.blake2b(digest_size=8)
    for example in data.train:
        found.update(example.input_ids.astype("<i8").tobytes())
    return int.from_bytes(found.digest(), "little")


def _shape(parameter: torch.nn.Parameter) -> tuple[int, ...]:
    """Return the whole shape of a parameter, which under ZeRO-3 is not its own."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _elements(parameter: torch.nn.Parameter) -> int:
    return int(getattr(parameter, "ds_numel", parameter.numel()))
