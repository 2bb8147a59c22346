"""The site's daemon: attach, take orders, do them one at a time a run, report. No torch, no fork."""

import asyncio
import os
import re
import signal
from collections import defaultdict
from collections.abc import Coroutine, Iterable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from fsllm.v1.federation_pb2 import (
    Accepted,
    Answer,
    Capabilities,
    Declined,
    Done,
    Failed,
    Order,
    OrderKind,
    Welcome,
    Withdraw,
)
from fsllm_client.link.attach import Attachment
from fsllm_client.link.channel import Link
from fsllm_client.link.download import Downloader, VersionCache
from fsllm_client.link.enroll import credential_for, keep_renewed
from fsllm_client.link.upload import Uploader
from fsllm_client.reporting import Display, Label, Reporter
from fsllm_client.settings import ClientSettings, extensions_folder
from fsllm_client.site.ledger import Ledger
from fsllm_client.site.machine import Machine
from fsllm_client.site.policy import Policy, ensure_policy
from fsllm_client.site.privacy import PrivacyBudget
from fsllm_client.site.runs import RunBook
from fsllm_client.site.state import StateFolder
from fsllm_client.work import Job, Means, Member, Work
from fsllm_client.workshop import Workshop
from fsllm_common import __version__
from fsllm_common.errors import FsllmError, PolicyRefused, SettingsInvalid
from fsllm_common.plan import plan_from_json
from fsllm_common.telemetry.logs import bound, get_logger
from fsllm_common.telemetry.metrics import ClientMetrics
from fsllm_common.telemetry.notify import notify
from fsllm_common.telemetry.web import WebServer

if TYPE_CHECKING:
    from fsllm_client.trainer.supervisor import Trainer

log = get_logger()

_RUN_ID: Final = re.compile(r"[A-Za-z0-9_-]{1,128}")

DECLINING: Final = frozenset(
    {
        "BUDGET_SPENT",
        "DATA_INVALID",
        "MODEL_MISSING",
        "MODEL_UNSUITABLE",
        "NO_GLOBAL_MODEL",
        "PLAN_INVALID",
        "SETTING_INVALID",
        "TRAINER_MISSING",
    }
)
"""Reasons that the next round would not cure: the site declines the run. Others, of training, are Failed."""

_SETTLED: Final = frozenset({"RUN_ENDED", "RUN_CANCELLED", "RUN_FAILED"})


@dataclass(slots=True)
class InHand:
    """An order that the daemon works on."""

    run_id: str
    task: asyncio.Task[None]
    accepted: bool = False


class Daemon:
    """One site's (or evaluator's) daemon."""

    def __init__(self, settings: ClientSettings, display: Display) -> None:
        """Check what can be checked before anything is opened.

        Raises:
            SettingsInvalid: The data is not there, the policy has an error.
            FsllmError: STATE_LOCKED, STATE_CORRUPT.

        """
        self._settings = settings
        self._display = display
        _must_exist(settings.data, "--data")
        if settings.deepspeed_config is not None:
            _must_exist(settings.deepspeed_config, "--deepspeed-config")
        self._state = StateFolder(settings.state_dir)
        self._policy_path = settings.policy or self._state.policy
        if settings.policy is None:
            self._policy_is_new = ensure_policy(self._policy_path)
        else:
            self._policy_is_new = False
        self._policy = Policy.read(self._policy_path)
        self._machine = Machine.look()
        self._metrics = ClientMetrics()
        self._runs = RunBook(self._state.runs)
        self._in_hand: dict[str, InHand] = {}
        self._turns: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._reloaded = asyncio.Event()
        self._untidy = asyncio.Event()

    async def run(self) -> None:
        """Serve until SIGTERM or SIGINT.

        Raises:
            FsllmError: A cause that waiting does not cure, e.g. MEMBER_REVOKED.

        """
        async with AsyncExitStack() as stack:
            self._state.lock()
            stack.callback(self._state.unlock)
            if self._settings.metrics_port is not None:
                web = WebServer(
                    self._settings.metrics_listen, self._settings.metrics_port, self._metrics.registry, [self._unready]
                )
                web.start()
                stack.callback(web.stop)
                log.info("metrics are served", address=f"{self._settings.metrics_listen}:{web.port}")
            if self._policy_is_new:
                log.info("a policy with the defaults was written; read it", file=str(self._policy_path))
            credential = await credential_for(self._state.identity, self._settings.server, self._settings.join)
            link = Link(self._settings.server, credential, self._settings.keepalive_seconds)
            stack.push_async_callback(link.close)
            await self._serve(link, stack)

    async def _serve(self, link: Link, stack: AsyncExitStack) -> None:
        machine = self._machine
        member = Member(
            link.credential.member.name, "evaluator" if link.credential.member.role == "evaluator" else "site"
        )
        stack.enter_context(bound(site=member.name))
        workshop = Workshop(self._make_trainer, self._metrics)
        stack.push_async_callback(workshop.close)
        self._work = Work(
            Means(member, self._settings.data.resolve(), self._settings.deepspeed_config, machine.trainer, self._state),
            Downloader(link, VersionCache(self._state.cache), self._metrics),
            Uploader(link, self._metrics),
            workshop,
            PrivacyBudget(Ledger(self._state.ledger)),
            self._metrics,
        )
        capabilities = Capabilities(
            gpus=machine.gpus,
            gpu_memory_bytes=machine.gpu_memory_bytes,
            host_memory_bytes=machine.host_memory_bytes,
            trainer=machine.trainer,
        )
        self._attachment = Attachment(link, self, capabilities, self._metrics)
        log.info(
            "starting",
            version=__version__,
            role=member.role,
            server=link.server,
            state=str(self._state.root),
            pid=os.getpid(),
        )
        stack.push_async_callback(self._drop_everything)
        stopping = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stopping.set)
        loop.add_signal_handler(signal.SIGHUP, self._reload)
        notify("READY=1")
        renewal = keep_renewed(link, self._state.identity, self._metrics)
        await _first(self._attachment.run(), renewal, self._keep_tidy(), stopping.wait())
        notify("STOPPING=1")
        log.info("stopping")

    def _make_trainer(self) -> "Trainer":
        from fsllm_client.trainer import supervisor  # after the first order that needs it

        settings = self._settings
        return supervisor.Trainer(
            self._state.root,
            ranks=settings.ranks or max(1, self._machine.gpus),
            threads=settings.trainer_threads,
            extensions=extensions_folder(settings.torch_extensions_dir),
        )

    # What the attachment tells: see link.attach.Listener.

    def welcomed(self, welcome: Welcome) -> None:
        """Log who we are to the server, and ask it what has become of results that were left here."""
        self._untidy.set()
        log.info(
            "attached",
            federation=welcome.federation,
            member=welcome.member,
            role=welcome.role,
            server=welcome.software_version,
        )

    def held(self) -> Iterable[str]:
        """Return the orders that need not be sent again."""
        return [order_id for order_id, item in self._in_hand.items() if item.accepted]

    def ordered(self, order: Order) -> None:
        """Begin an order, unless it is in hand already."""
        if order.order_id in self._in_hand:
            return
        task = asyncio.create_task(self._carry_out(order), name=f"order {order.order_id}")
        self._in_hand[order.order_id] = InHand(order.run_id, task)

    def withdrawn(self, withdraw: Withdraw) -> None:
        """Drop an order."""
        item = self._in_hand.get(withdraw.order_id)
        if item is not None:
            log.info("order withdrawn", order=withdraw.order_id, reason=withdraw.reason, why=withdraw.message)
            item.task.cancel()
            if withdraw.reason in _SETTLED:
                self._metrics.forget_run(item.run_id)

    # One order, from its arrival to its final answer.

    async def _carry_out(self, order: Order) -> None:
        kind = (
            OrderKind.Name(order.kind).removeprefix("ORDER_KIND_").lower()
            if order.kind in OrderKind.values()
            else "unknown"
        )
        loop = asyncio.get_running_loop()
        began = loop.time()
        outcome = "withdrawn"
        with bound(run=order.run_id, round=order.round, order=kind):
            try:
                answer = await self._answer_to(order, kind)
                outcome = answer.WhichOneof("outcome") or "delivered"
                if outcome != "delivered":
                    # Out of hand first: a server that missed the answer must send the order again.
                    self._in_hand.pop(order.order_id, None)
                    self._attachment.answer(answer)
                log.info(f"order {outcome}", seconds=round(loop.time() - began, 2))
            finally:
                self._in_hand.pop(order.order_id, None)
                self._untidy.set()
                self._metrics.orders.labels(kind, outcome).inc()
                self._metrics.order_seconds.labels(kind).observe(loop.time() - began)

    async def _answer_to(self, order: Order, kind: str) -> Answer:
        """Return the final answer; without an outcome when the result was uploaded instead."""
        try:
            done = await self._attempt(order, kind)
        except FsllmError as error:
            log.warning(f"{kind} order not done", reason=error.reason, error=error.message, cure=error.cure)
            if isinstance(error, PolicyRefused) or (error.reason in DECLINING and kind != "train"):
                return Answer(order_id=order.order_id, declined=Declined(reason=error.reason, message=error.message))
            return Answer(order_id=order.order_id, failed=Failed(reason=error.reason, message=error.message))
        except Exception:
            # A bug in one order must end neither the daemon nor the other runs; the log has the trace.
            log.exception("an order failed by a bug")
            return Answer(
                order_id=order.order_id, failed=Failed(reason="INTERNAL", message="A bug at the site; see its log")
            )
        return Answer(order_id=order.order_id, done=done)

    async def _attempt(self, order: Order, kind: str) -> Done | None:
        if not _RUN_ID.fullmatch(order.run_id):  # it names folders and files here
            raise FsllmError("ORDER_UNKNOWN", "The run's id is not of letters, digits, '-' and '_'")
        plan = plan_from_json(order.plan)
        reporter = Reporter(
            Label(order.order_id, plan.name, order.round, kind),
            self._attachment.progress,
            self._display,
            loss_may_leave=self._policy.loss_may_leave(plan),
        )
        job = Job(order, plan, self._policy, reporter)
        try:
            if kind == "join":
                job = await self._admit(job)
            self._in_hand[order.order_id].accepted = True
            self._attachment.answer(Answer(order_id=order.order_id, accepted=Accepted()))
            async with self._turns[order.run_id]:
                log.info("order accepted", plan=plan.name)
                metrics = await self._work.do(job)
        except PolicyRefused as error:
            self._runs.note(order.run_id, plan, "declined", error.message)
            raise
        except FsllmError as error:
            if kind == "join" and error.reason in DECLINING:
                self._runs.note(order.run_id, plan, "declined", error.message)
            raise
        finally:
            reporter.end()
        if kind == "join":
            self._runs.note(order.run_id, plan, "joined")
        return metrics

    async def _admit(self, job: Job) -> Job:
        """Check a run against the policy, and wait for a person where the policy says so; it may change meanwhile."""
        await self._work.refuse(job)
        while not (job.policy.accept.automatic or self._runs.is_accepted(job.order.run_id)):
            self._runs.note(job.order.run_id, job.plan, "waiting", "for `fsllm-client accept`")
            log.warning("this run waits for a person: `fsllm-client accept RUN`", name=job.plan.name)
            self._reloaded.clear()
            await self._reloaded.wait()
            job = Job(job.order, job.plan, self._policy, job.reporter)
            await self._work.refuse(job)
        return job

    async def _keep_tidy(self) -> None:
        while True:
            await self._untidy.wait()
            self._untidy.clear()
            try:
                await self._work.deliveries.tidy(self._turns)
            except FsllmError as error:  # the next attachment, or the next order's end, is another chance
                log.warning("results may be left in the outbox", reason=error.reason, error=error.message)

    async def _drop_everything(self) -> None:
        """End the orders in hand; the server will send them again."""
        tasks = [item.task for item in self._in_hand.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _reload(self) -> None:
        """SIGHUP: read the policy again, and look who was accepted."""
        try:
            self._policy = Policy.read(self._policy_path)
        except FsllmError as error:
            log.warning("the policy was not read again; the old one stays in force", error=error.message)
        else:
            log.info("policy read again", file=str(self._policy_path))
        self._reloaded.set()

    def _unready(self) -> str | None:
        """For /readyz, from the web thread."""
        return None if getattr(self, "_attachment", None) is not None and self._attachment.attached else "not attached"


async def _first(*coroutines: Coroutine[Any, Any, object]) -> None:
    """Wait until one of these ends, cancel the others, and raise what it raised."""
    tasks = [asyncio.create_task(coroutine) for coroutine in coroutines]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _must_exist(path: Path, flag: str) -> None:
    if not path.exists():
        raise SettingsInvalid(f"{flag}: {path} does not exist")
    if not os.access(path, os.R_OK):
        raise SettingsInvalid(f"{flag}: {path} can not be read")
