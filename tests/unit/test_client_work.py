"""What an order does at the site: the outbox before the ledger, the ledger before the upload, nothing twice."""

import asyncio
import json
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from fsllm.v1.federation_pb2 import (
    ORDER_KIND_EVALUATE,
    ORDER_KIND_JOIN,
    ORDER_KIND_TRAIN,
    Done,
    Order,
    OrderKind,
    Progress,
    Receipt,
    UploadStatusResponse,
    Version,
)
from fsllm_client.link.download import CachedVersion
from fsllm_client.reporting import Label, Reporter, Silent
from fsllm_client.site.ledger import Ledger
from fsllm_client.site.model import model_digest
from fsllm_client.site.outbox import Parcel
from fsllm_client.site.policy import Policy, Role
from fsllm_client.site.privacy import PrivacyBudget
from fsllm_client.site.state import StateFolder
from fsllm_client.trainer.kept import PRIVATE, Kept
from fsllm_client.trainer.orders import Account, Advanced, Evaluate, Finished, Train
from fsllm_client.work import Job, Means, Member, Work
from fsllm_common import failpoints
from fsllm_common.accounting.budget import epsilon_of
from fsllm_common.errors import FsllmError, ModelUnusable, PolicyRefused, Refused, TrainingFailed, Unavailable
from fsllm_common.plan import Plan, canonical_json
from fsllm_common.telemetry.metrics import ClientMetrics
from fsllm_common.tensors.arrays import encode, load_arrays, save_arrays
from fsllm_common.tensors.manifest import WIRE_TYPES

NOISE = [{"stage": "clip", "norm": 0.5}, {"stage": "noise", "multiplier": 2.0, "delta": 1e-5}]


class FakeTrainer:
    """Writes a delta as long as it is allowed to train, and keeps a state that waits for the receipt."""

    def __init__(self) -> None:
        self.trained = 0
        self.origins: list[int | None] = []
        self.measured: list[int] = []
        self.fails: FsllmError | None = None

    async def run(self, order: object, on_progress: Callable[[Advanced], None] | None = None) -> Finished:
        match order:
            case Train(base=base, delta=delta, round=round_, resume=Path() as resume):
                if self.fails is not None:
                    raise self.fails
                self.trained += 1
                kept = Kept(resume, PRIVATE)
                self.origins.append(kept.origin(round_))
                kept.save(round_, {"x": torch.ones(1)}, acknowledged=False)
                # The base as the trainer sees it: float32, by name.
                save_arrays({name: np.full_like(array, round_) for name, array in load_arrays(base).items()}, delta)
                counts = {"examples": 7, "tokens": 70, "steps": 3}
                metrics = {"train_loss": 1.5, "tokens_per_second": 9.0}
                return Finished(counts=counts, metrics=metrics, model_digest="01" * 32)
            case Account(multiplier=multiplier, releases=releases, delta=delta_):
                return Finished(metrics={"epsilon": epsilon_of(multiplier, releases, delta_)})
            case Evaluate(version=version):
                self.measured.append(version)
                return Finished(metrics={"loss": 2.0, "perplexity": 7.4}, counts={"examples": 5, "tokens": 50})
        raise AssertionError(order)


class Site:
    """One site's work with everything real but the trainer and the wire."""

    def __init__(self, root: Path, policy: str = "", role: Role = "site", **plan: object) -> None:
        self.root = root
        self.role: Role = role
        self.trainer = FakeTrainer()
        self.finished = Finished(counts={"train_rows": 7})
        self.prepared_times = 0
        self.sent: list[Parcel] = []
        self.payloads: list[bytes] = []
        self.refusal: FsllmError | None = None
        self.status_of = UploadStatusResponse()
        self.asked = 0
        self.state = StateFolder(root / "state")
        model = root / "model"
        model.mkdir(exist_ok=True)
        (model / "config.json").write_text("{}")
        self.state.policy.write_text(f'[models]\nm = "{model}"\n{policy}')
        keys = {"algorithm": {"weighting": "uniform"}, "wire": {"element_type": "fp32"}, **plan}
        self.plan = Plan.model_validate({"name": "p", "rounds": 3, "model": {"name": "m"}, **keys})
        arrays = {"x.lora_A.weight": np.ones((2, 3), np.float32)}
        payload = root / "base"
        self.base = CachedVersion(encode(arrays, WIRE_TYPES["fp32"], payload), payload)
        self.restart()

    def restart(self) -> None:
        """Begin a new process over the same folder."""
        self.work = Work(
            Means(Member("a", self.role), self.root, None, trainer_installed=True, state=self.state),
            cast("Any", self),
            cast("Any", self),
            cast("Any", self),
            PrivacyBudget(Ledger(self.state.ledger)),
            ClientMetrics(),
        )

    # The downloader, the uploader, the workshop.

    async def fetch(self, run_id: str, version: Version, advance: object) -> list[CachedVersion]:
        assert (run_id, version.digest) == ("r", self.base.manifest.digest)
        return [self.base]

    async def deliver(self, parcel: Parcel, advance: object) -> Receipt:
        self.ledger_at_upload = self.releases()
        if self.refusal is not None:
            raise self.refusal
        self.sent.append(parcel)
        self.payloads.append(parcel.payload.read_bytes())
        return Receipt(digest=parcel.digest, payload_bytes=parcel.begin.manifest.payload_bytes)

    async def status(self, parcel: Parcel) -> UploadStatusResponse:
        self.asked += 1
        return self.status_of

    @asynccontextmanager
    async def prepared(self, prepare: object, on_progress: object) -> AsyncIterator[FakeTrainer]:
        self.prepared_times += 1
        yield self.trainer

    async def do(self, round_: int = 1, order_id: str = "o1", kind: OrderKind = ORDER_KIND_TRAIN) -> Done | None:
        base = Version(number=round_ - 1, digest=self.base.manifest.digest)
        order = Order(order_id=order_id, run_id="r", round=round_, kind=kind, plan=canonical_json(self.plan), base=base)
        sent: list[Progress] = []
        reporter = Reporter(Label(order_id, "p", round_, "train"), sent.append, Silent(), loss_may_leave=True)
        return await self.work.do(Job(order, self.plan, Policy.read(self.state.policy), reporter))

    def releases(self) -> list[tuple[int, str]]:
        try:
            lines = self.state.ledger.read_text().splitlines()
        except FileNotFoundError:
            return []
        return [(release["round"], release["digest"]) for release in map(json.loads, lines)]


async def test_a_delta_is_trained_announced_and_leaves_the_outbox_with_its_receipt(tmp_path: Path) -> None:
    site = Site(tmp_path)
    assert await site.do(2) is None
    (parcel,) = site.sent
    begin = parcel.begin
    assert (begin.order_id, begin.run_id, begin.round) == ("o1", "r", 2)
    assert begin.base_digest == site.base.manifest.digest
    assert begin.model_digest == b"\1" * 32
    assert (begin.examples, begin.tokens, begin.steps) == (7, 70, 3)
    assert {metric.name for metric in begin.metrics} == {"train_loss", "tokens_per_second"}
    assert np.frombuffer(site.payloads[0], "<f4").tolist() == [2.0] * 6
    assert list(site.state.outbox.iterdir()) == []
    assert not list(site.state.trainer.glob("*.delta*"))


@pytest.mark.parametrize("stages", [(), NOISE])
async def test_an_upload_that_was_cut_off_is_sent_again_not_trained_again(tmp_path: Path, stages: object) -> None:
    site = Site(tmp_path, pipeline=stages)
    site.refusal = Unavailable("SERVER_UNREACHABLE", "away")
    with pytest.raises(Unavailable):
        await site.do(1, "o1")
    (folder,) = site.state.outbox.iterdir()
    kept = (folder / "payload").read_bytes()
    site.refusal = None
    site.restart()
    await site.do(1, "o2")
    assert site.trainer.trained == 1
    assert site.payloads == [kept]
    assert site.sent[0].begin.order_id == "o2", "under the order that asks now"
    assert len(site.releases()) == (1 if stages else 0)


async def test_the_ledger_holds_the_release_before_it_leaves_and_holds_it_once(tmp_path: Path) -> None:
    site = Site(tmp_path, pipeline=NOISE)
    for round_ in (1, 2):
        await site.do(round_)
        assert site.ledger_at_upload[-1] == (round_, site.sent[-1].digest.hex())
    assert [round_ for round_, _ in site.releases()] == [1, 2]
    begin = site.sent[1].begin
    metrics = {metric.name: metric.value for metric in begin.metrics}
    assert metrics["epsilon"] == pytest.approx(epsilon_of(2.0, 2, 1e-5))
    assert not {"train_loss", "delta_norm"} & set(metrics)
    assert (begin.examples, begin.tokens) == (0, 0), "exact counts are not covered by the noise"


async def test_a_crash_between_the_outbox_and_the_ledger_hides_no_release(tmp_path: Path) -> None:
    site = Site(tmp_path, pipeline=NOISE)
    site.refusal = Unavailable("SERVER_UNREACHABLE", "away")
    with pytest.raises(Unavailable):
        await site.do()
    site.state.ledger.unlink()
    site.refusal = None
    site.restart()
    await site.do()
    assert site.releases() == [(1, site.sent[0].digest.hex())]


async def test_the_budget_is_asked_before_training(tmp_path: Path) -> None:
    bound = epsilon_of(2.0, 1, 1e-5) + 1e-6
    site = Site(tmp_path, f"[privacy]\nmaximum_epsilon_per_run = {bound}\n", pipeline=NOISE)
    await site.do(1)
    with pytest.raises(PolicyRefused) as caught:
        await site.do(2)
    assert caught.value.reason == "BUDGET_SPENT"
    assert site.trainer.trained == 1
    assert len(site.releases()) == 1


async def test_an_evaluator_that_trains_is_bound_as_a_site_is(tmp_path: Path) -> None:
    site = Site(tmp_path, role="evaluator", algorithm={"name": "fltrust"}, pipeline=NOISE)
    await site.do(1)
    (parcel,) = site.sent
    assert site.ledger_at_upload == [(1, parcel.digest.hex())]
    assert (parcel.begin.examples, parcel.begin.tokens) == (0, 0)
    assert "epsilon" in {metric.name for metric in parcel.begin.metrics}
    site.state.policy.write_text(site.state.policy.read_text() + "[data]\ntrain = false\n")
    with pytest.raises(PolicyRefused, match=r"data\.train"):
        await site.do(2)
    assert site.trainer.trained == 1


async def test_a_changed_policy_holds_for_the_next_round(tmp_path: Path) -> None:
    site = Site(tmp_path)
    await site.do(1)
    site.state.policy.write_text(site.state.policy.read_text() + "[accept]\nmaximum_rounds = 2\n")
    with pytest.raises(PolicyRefused, match="maximum_rounds = 2"):
        await site.do(2)
    assert site.trainer.trained == 1


@pytest.mark.parametrize(("reason", "kept"), [("NOT_FINITE", 0), ("UPDATE_CONFLICT", 0), ("NOT_WANTED", 1)])
async def test_what_nobody_can_use_leaves_the_outbox(tmp_path: Path, reason: str, kept: int) -> None:
    site = Site(tmp_path)
    site.refusal = Refused(reason, "no")
    with pytest.raises(Refused):
        await site.do(1)
    assert len(list(site.state.outbox.iterdir())) == kept
    # What was kept for a repeated round goes when the next one comes.
    site.refusal = None
    await site.do(2)
    assert list(site.state.outbox.iterdir()) == []


async def test_what_waits_for_the_receipt_counts_with_it_alone(tmp_path: Path) -> None:
    site = Site(tmp_path)
    await site.do(1)
    site.refusal = Refused("NOT_FINITE", "no")
    with pytest.raises(Refused):
        await site.do(2)
    site.refusal = None
    await site.do(3)
    await site.do(4)
    assert site.trainer.origins == [None, 1, 1, 3]
    assert site.asked == 0


class _KilledError(Exception):
    pass


@pytest.mark.parametrize("tidied", [True, False])
@pytest.mark.parametrize("point", ["receipt.received", "folder.synced", "parcel.removed"])
async def test_a_receipt_counts_though_the_site_is_killed_with_it_in_its_hand(
    point: str, tidied: bool, tmp_path: Path
) -> None:
    site = Site(tmp_path)
    await site.do(1)

    def strike(name: str) -> None:
        if name == point and (point != "folder.synced" or not kept.awaits(2)) and site.trainer.trained == 2:
            raise _KilledError

    kept = Kept(site.state.private("r"), PRIVATE)
    failpoints.listen(strike)
    try:
        with pytest.raises(_KilledError):
            await site.do(2)
    finally:
        failpoints.listen(None)
    assert kept.awaits(2) == (point == "receipt.received")
    site.restart()
    site.status_of = UploadStatusResponse(receipt=Receipt(digest=site.sent[-1].digest), round_over=True)
    if tidied:
        await site.work.deliveries.tidy(defaultdict(asyncio.Lock))
        assert list(site.state.outbox.iterdir()) == []
    await site.do(3)
    assert site.trainer.origins == [None, 1, 2]
    assert site.asked == (1 if point == "receipt.received" or (tidied and point == "folder.synced") else 0)


@pytest.mark.parametrize("tidied", [True, False])
async def test_what_the_server_never_had_is_forgotten_when_its_round_is_over(tidied: bool, tmp_path: Path) -> None:
    site = Site(tmp_path)
    await site.do(1)
    site.refusal = Unavailable("SERVER_UNREACHABLE", "away")
    with pytest.raises(Unavailable):
        await site.do(2)
    site.refusal = None
    site.restart()
    turns = defaultdict[str, asyncio.Lock](asyncio.Lock)
    await site.work.deliveries.tidy(turns)
    assert len(list(site.state.outbox.iterdir())) == 1, "its round goes on"
    site.status_of = UploadStatusResponse(round_over=True)
    if tidied:
        await site.work.deliveries.tidy(turns)
        assert list(site.state.outbox.iterdir()) == []
    await site.do(3)
    assert site.trainer.origins == [None, 1, 1]


async def test_failed_training_leaves_nothing(tmp_path: Path) -> None:
    site = Site(tmp_path, pipeline=NOISE)
    site.trainer.fails = TrainingFailed("LOSS_NOT_FINITE", "NaN")
    with pytest.raises(TrainingFailed):
        await site.do(1)
    assert list(site.state.outbox.iterdir()) == []
    assert site.releases() == []
    assert site.sent == []


async def test_a_site_with_other_weights_than_the_plan_means_does_not_join(tmp_path: Path) -> None:
    weights = tmp_path / "weights"
    weights.mkdir()
    (weights / "model.safetensors").write_bytes(b"the very weights")
    for digest, joins in ((model_digest(weights), True), ("0" * 64, False)):
        folder = tmp_path / f"{joins}"
        folder.mkdir()
        site = Site(folder, model={"name": "m", "digest": digest})
        (folder / "model" / "model.safetensors").write_bytes(b"the very weights")
        if joins:
            assert await site.do(kind=ORDER_KIND_JOIN) == Done(rank=8)
            assert site.prepared_times == 1
        else:
            with pytest.raises(ModelUnusable, match=f"model.digest is {digest}") as caught:
                await site.do(kind=ORDER_KIND_JOIN)
            assert caught.value.reason == "MODEL_MISSING"
            assert site.prepared_times == 0, "nothing is loaded of a model that is not the plan's"


async def test_an_evaluation_sends_what_the_policy_lets_leave(tmp_path: Path) -> None:
    site = Site(tmp_path)
    done = await site.do(4, kind=ORDER_KIND_EVALUATE)
    assert site.trainer.measured == [3], "the version's number"
    assert done is not None
    assert [(m.name, m.value, m.weight) for m in done.metrics] == [("loss", 2.0, 50.0), ("perplexity", 7.4, 50.0)]
    (tmp_path / "shy").mkdir()
    shy = Site(tmp_path / "shy", '[leave]\nmetrics = ["perplexity"]\n')
    done = await shy.do(1, kind=ORDER_KIND_EVALUATE)
    assert done is not None
    assert [m.name for m in done.metrics] == ["perplexity"]
