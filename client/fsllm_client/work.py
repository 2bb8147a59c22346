"""What the daemon does for each kind of order. Each ends with metrics, with a receipt, or with an FsllmError.

What must keep its order: the policy before the trainer, the budget before training, the outbox before the ledger, the
ledger before the upload.
"""

import asyncio
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from fsllm.v1.federation_pb2 import (
    ORDER_KIND_BUILD,
    ORDER_KIND_CHECK,
    ORDER_KIND_EVALUATE,
    ORDER_KIND_JOIN,
    ORDER_KIND_TRAIN,
    Done,
    Metric,
    Order,
    UploadBegin,
)
from fsllm.v1.tensors_pb2 import Manifest
from fsllm_client.delivering import Deliveries
from fsllm_client.link.download import CachedVersion, Downloader
from fsllm_client.link.upload import Uploader
from fsllm_client.reporting import Reporter
from fsllm_client.round_clock import RoundClock
from fsllm_client.site import payloads, synthetic
from fsllm_client.site.model import check_model_digest
from fsllm_client.site.outbox import Outbox, Parcel
from fsllm_client.site.policy import PlanNoise, Policy, Role
from fsllm_client.site.privacy import PrivacyBudget, closed_form, noise_of, part_in, trains
from fsllm_client.site.state import StateFolder
from fsllm_client.trainer.orders import Advanced, Build, Evaluate, Finished, Prepare, Train
from fsllm_client.workshop import Workshop, account
from fsllm_common.algorithms import algorithm_class
from fsllm_common.errors import FsllmError, InputError, ModelUnusable
from fsllm_common.files import make_folder
from fsllm_common.plan import Plan
from fsllm_common.telemetry.logs import get_logger
from fsllm_common.telemetry.metrics import ClientMetrics

if TYPE_CHECKING:
    from fsllm_client.trainer.supervisor import Trainer

log = get_logger()

_BUILD_BASE: Final = b""
"""Version 0 has no base."""


class Member(NamedTuple):
    """Who this daemon is, by its certificate."""

    name: str
    role: Role


@dataclass(frozen=True, slots=True)
class Means:
    """What the site gives to the work."""

    member: Member
    data: Path
    deepspeed_config: Path | None
    trainer_installed: bool
    state: StateFolder


@dataclass(frozen=True, slots=True)
class Job:
    """An order, its plan, and the policy of the moment it arrived."""

    order: Order
    plan: Plan
    policy: Policy
    reporter: Reporter

    def advance(self, activity: str) -> Callable[[int, int], None]:
        """Return a callback for (done, total) of one activity."""
        return lambda done, total: self.reporter.advance(activity, done, total)


class Work:
    """Carries out orders."""

    def __init__(
        self,
        means: Means,
        downloader: Downloader,
        uploader: Uploader,
        workshop: Workshop,
        budget: PrivacyBudget,
        metrics: ClientMetrics,
    ) -> None:
        self._means = means
        self._downloader = downloader
        self._workshop = workshop
        self._budget = budget
        self._metrics = metrics
        self._outbox = Outbox(means.state.outbox)
        self.deliveries = Deliveries(self._outbox, uploader, means.state)
        # What orders of an earlier process left to the trainer; each is made anew when it is needed.
        for pattern in ("*.safetensors", "*.payload"):
            for left in means.state.trainer.glob(pattern):
                left.unlink()

    async def refuse(self, job: Job) -> None:
        """Refuse what the site does not allow or has no means for, before anything is loaded.

        Raises:
            FsllmError: POLICY_REFUSED, MODEL_MISSING, TRAINER_MISSING, PLAN_INVALID.

        """
        job.policy.refuse(job.plan, self._part(job.plan))
        if not trains(job.plan):
            return
        if not self._means.trainer_installed:
            raise InputError("TRAINER_MISSING", f"{self._means.member.name} has no training stack")
        if self._means.member.role == "evaluator" and algorithm_class(job.plan.algorithm.name)(job.plan).personalised:
            message = f"{job.plan.algorithm.name} makes a model for each site; an evaluator would measure none of them"
            raise ModelUnusable("NO_GLOBAL_MODEL", message)
        job.policy.model_folder(job.plan.model.name)
        if (noise := self._noise(job.plan)) is not None:
            await self._budget.refuse_plan(job.plan, job.order.run_id, job.policy, noise)

    async def do(self, job: Job) -> Done | None:
        """Carry out an order; return what to answer, or None when the result was uploaded.

        Raises:
            FsllmError: Why it can not be done.

        """
        match job.order.kind:
            case kind if kind == ORDER_KIND_JOIN:
                return await self._join(job)
            case kind if kind == ORDER_KIND_CHECK:
                return await self._check(job)
            case kind if kind == ORDER_KIND_EVALUATE:
                return await self._evaluate(job)
            case kind if kind == ORDER_KIND_BUILD:
                await self._build(job)
            case kind if kind == ORDER_KIND_TRAIN:
                await self._train(job)
            case kind:
                raise FsllmError("ORDER_UNKNOWN", f"This daemon does not know orders of kind {kind}")
        return None

    # JOIN: is everything here that the run needs?

    async def _join(self, job: Job) -> Done:
        if trains(job.plan):
            folder = job.policy.model_folder(job.plan.model.name)
            if folder is not None and job.plan.model.digest is not None:
                await asyncio.to_thread(check_model_digest, folder, job.plan.model.digest)
            async with self._trainer(job):
                counts = self._workshop.finished.counts
            log.info("prepared", **counts)
            if self._part(job.plan) == "site":
                job.policy.refuse_rows(counts.get("train_rows", 0))
        return Done(rank=self._rank(job))

    # BUILD and CHECK: version 0.

    async def _build(self, job: Job) -> None:
        parcel = self._outbox.find(job.order.run_id, 0, _BUILD_BASE)
        if parcel is None:
            payload = self._outbox.prepare(job.order.run_id, 0, _BUILD_BASE)
            try:
                manifest = await self._version_zero(job, payload)
            except FsllmError:
                self._outbox.abandon(job.order.run_id, 0, _BUILD_BASE)
                raise
            begin = UploadBegin(run_id=job.order.run_id, round=0, base_digest=_BUILD_BASE, manifest=manifest)
            parcel = self._outbox.commit(begin, durable=trains(job.plan))
        await self._deliver(job, parcel)

    async def _check(self, job: Job) -> Done:
        theirs = await self._fetch(job)
        own = self._scratch(job, "payload")
        try:
            mine = CachedVersion(await self._version_zero(job, own), own)
            await asyncio.to_thread(payloads.refuse_difference, mine, theirs, job.plan, self._rank(job))
        finally:
            own.unlink(missing_ok=True)
        return Done()

    async def _version_zero(self, job: Job, payload: Path) -> Manifest:
        """Write this site's own version 0 and return its manifest."""
        if not trains(job.plan):
            return await asyncio.to_thread(synthetic.write_version_zero, job.plan, payload)
        adapter = self._scratch(job, "safetensors")
        try:
            async with self._trainer(job) as trainer:
                await trainer.run(Build(adapter=adapter, rank=job.plan.adapter.rank), self._watch(job))
            return await asyncio.to_thread(payloads.encode_adapter, adapter, job.plan, payload)
        finally:
            adapter.unlink(missing_ok=True)

    # TRAIN

    async def _train(self, job: Job) -> None:
        order, noise, clock = job.order, self._noise(job.plan), RoundClock(self._metrics)
        await self.deliveries.settle_before(order.run_id, order.round)
        parcel = self._outbox.find(order.run_id, order.round, order.base.digest)
        if parcel is None:
            job.policy.refuse(job.plan, self._part(job.plan))
            try:
                parcel = await (self._make_delta(job, noise, clock) if trains(job.plan) else self._make_up_delta(job))
            except FsllmError:
                self._outbox.abandon(order.run_id, order.round, order.base.digest)  # half of it may fill the disk
                raise
        else:
            log.info("this round's delta is in the outbox: it is sent, not trained again")
        if noise is not None and not self._budget.holds(order.run_id, order.round, parcel.digest):
            spent = await self._budget.forecast(closed_form, order.run_id, job.policy, noise)
            self._budget.record(job.plan, order.run_id, order.round, parcel.digest, noise, spent)
        await self._deliver(job, parcel)
        clock.acknowledged()

    async def _make_delta(self, job: Job, noise: PlanNoise | None, clock: RoundClock) -> Parcel:
        order, state = job.order, self._means.state
        job.policy.refuse_hour(datetime.now().astimezone())
        base = await self._adapter_file(job)
        delta = self._scratch(job, "safetensors")
        metrics: dict[str, float] = {}
        try:
            async with self._trainer(job) as trainer:
                if noise is not None:
                    spent = await self._budget.refuse_release(
                        lambda *what: account(trainer, *what), order.run_id, job.policy, noise
                    )
                    metrics["epsilon"] = spent.run
                    self._metrics.epsilon.labels(order.run_id).set(spent.run)
                private = state.private(order.run_id)
                make_folder(private)
                train = Train(round=order.round, base=base, delta=delta, resume=private)
                done = await trainer.run(train, self._watch(job, clock))
            payload = self._outbox.prepare(order.run_id, order.round, order.base.digest)
            manifest, facts = await asyncio.to_thread(payloads.encode_delta, delta, job.plan, payload)
        finally:
            delta.unlink(missing_ok=True)
        metrics |= facts.metrics()
        for name in ("train_loss", "tokens_per_second", "seconds"):
            if name in done.metrics:
                metrics[name] = done.metrics[name]
        self._metrics.steps.inc(done.counts.get("steps", 0))
        self._metrics.tokens.inc(done.counts.get("tokens", 0))
        if "gpu_memory_bytes" in done.metrics:
            self._metrics.gpu_memory_bytes.set(done.metrics["gpu_memory_bytes"])
        return self._outbox.commit(self._announcement(job, manifest, done, metrics))

    async def _make_up_delta(self, job: Job) -> Parcel:
        """Make the noop algorithm's delta. It has a closed form, so neither its payload nor its parcel is synced."""
        order = job.order
        (base,) = await self._fetch(job)  # in one piece
        payload = self._outbox.prepare(order.run_id, order.round, order.base.digest)
        value = synthetic.delta_value(self._means.member.name, order.round)
        manifest = await asyncio.to_thread(synthetic.write_delta, job.plan, base.manifest, value, payload)
        done = Finished(counts={"examples": 1, "tokens": 1, "steps": 1})
        return self._outbox.commit(self._announcement(job, manifest, done, {}), durable=False)

    def _announcement(self, job: Job, manifest: Manifest, done: Finished, metrics: dict[str, float]) -> UploadBegin:
        order, counts = job.order, done.counts
        noised = self._noise(job.plan) is not None
        leaving = job.policy.update_metrics(metrics, noised=noised)
        # The noise does not cover exact counts. A plan with noise weighs uniformly, so nobody needs them.
        examples, tokens = (0, 0) if noised else (counts.get("examples", 0), counts.get("tokens", 0))
        return UploadBegin(
            run_id=order.run_id,
            round=order.round,
            base_digest=order.base.digest,
            manifest=manifest,
            examples=examples,
            tokens=tokens,
            steps=counts.get("steps", 0),
            metrics=[Metric(name=name, value=value) for name, value in leaving.items()],
            model_digest=bytes.fromhex(done.model_digest),
        )

    # EVALUATE

    async def _evaluate(self, job: Job) -> Done:
        wanted = job.policy.evaluation_metrics(job.plan)
        if not trains(job.plan) or not wanted:
            return Done()
        adapter = await self._adapter_file(job)
        async with self._trainer(job) as trainer:
            private = self._means.state.private(job.order.run_id)
            evaluate = Evaluate(adapter=adapter, version=job.order.base.number, resume=private)
            done: Finished = await trainer.run(evaluate, self._watch(job))
        if "loss" in done.metrics:
            self._metrics.loss.labels(job.order.run_id).set(done.metrics["loss"])
        weight = {"exact_match": done.counts.get("examples", 0)}
        tokens = done.counts.get("tokens", 0)
        metrics = [
            Metric(name=name, value=done.metrics[name], weight=weight.get(name, tokens))
            for name in wanted
            if name in done.metrics
        ]
        return Done(metrics=metrics)

    # What several of them need.

    async def _deliver(self, job: Job, parcel: Parcel) -> None:
        # The same result may go out under a later order than the one it was made for.
        parcel.begin.order_id = job.order.order_id
        await self.deliveries.deliver(parcel, job.reporter.advance)

    def _rank(self, job: Job) -> int:
        """Return the rank of this site's adapter."""
        return job.policy.rank(job.plan, self._part(job.plan))

    async def _fetch(self, job: Job) -> list[CachedVersion]:
        return await self._downloader.fetch(job.order.run_id, job.order.base, job.advance("downloading"))

    async def _adapter_file(self, job: Job) -> Path:
        """Return the order's base version as a file for the trainer, one a run."""
        version = await self._fetch(job)
        target = self._means.state.trainer / f"{job.order.run_id}-{job.order.base.digest.hex()[:16]}.safetensors"
        if not target.exists():
            for old in self._means.state.trainer.glob(f"{job.order.run_id}-*.safetensors"):
                old.unlink()
            await asyncio.to_thread(payloads.write_adapter, version, target)
        return target

    def _trainer(self, job: Job) -> "AbstractAsyncContextManager[Trainer]":
        folder = job.policy.model_folder(job.plan.model.name)
        if folder is None:
            raise InputError(
                "MODEL_MISSING",
                f"The algorithm {job.plan.algorithm.name} trains, and {job.plan.model.name} is no model",
            )
        prepare = Prepare(
            run_id=job.order.run_id,
            plan=job.plan.with_rank(self._rank(job)),
            model=folder,
            data=self._means.data,
            role=self._part(job.plan),
            deepspeed_config=self._means.deepspeed_config,
        )
        return self._workshop.prepared(prepare, self._watch(job))

    def _watch(self, job: Job, clock: RoundClock | None = None) -> Callable[[Advanced], None]:
        """Return what hears the trainer's progress of an order."""

        def advanced(step: Advanced) -> None:
            if clock is not None:
                clock.advanced(step)
            if step.activity == "training":
                if "loss" in step.metrics:
                    self._metrics.training_loss.labels(job.order.run_id).set(step.metrics["loss"])
                if "tokens_per_second" in step.metrics:
                    self._metrics.tokens_per_second.set(step.metrics["tokens_per_second"])
            job.reporter.advance(step.activity, step.done, step.total, step.metrics)

        return advanced

    def _scratch(self, job: Job, kind: str) -> Path:
        return self._means.state.trainer / f"{job.order.run_id}.{job.order.kind}.{kind}"

    def _noise(self, plan: Plan) -> PlanNoise | None:
        return noise_of(plan, self._part(plan))

    def _part(self, plan: Plan) -> Role:
        return part_in(plan, self._means.member.role)
