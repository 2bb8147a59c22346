"""Would the simulation see it? Each mutation takes one line's worth of care out of the code; some seed of a few hundred
must then break the very promise that the line keeps, in the checker's eyes."""

import os
import shutil
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from simulation import run
from simulation.disk import Synced
from simulation.script import Rough
from test_simulation import _light_collections  # noqa: F401 - a fixture for this module too

from fsllm_client import work
from fsllm_client.delivering import Deliveries
from fsllm_client.site.outbox import Outbox
from fsllm_client.trainer.kept import Kept
from fsllm_common.algorithms.fedavg import FedAvg
from fsllm_common.errors import FsllmError
from fsllm_common.tensors import manifest
from fsllm_server.engine import core, uploads
from fsllm_server.engine.engine import Engine
from fsllm_server.engine.state import Run
from fsllm_server.engine.turn import Turn
from fsllm_server.reduce.sum import WeightedSum
from fsllm_server.service.admission import Admission
from fsllm_server.store.spools import Spool, Spools

SEEDS = 300
Patch = pytest.MonkeyPatch
Mutation = Callable[[Patch], None]
MUTATIONS: list[tuple[int, int, Rough, Mutation]] = []


def breaks(promise: int, first: int = 0, rough: Rough = "server") -> Callable[[Mutation], Mutation]:
    """Register a mutation with the promise that it breaks.

    Args:
        promise: Its number.
        first: Where looking for a seed begins: one that sees it, when this was written. Any change to what is played
            moves it, so that others must be plenty.
        rough: What makes seeds that see it plenty.

    """

    def register(mutation: Mutation) -> Mutation:
        MUTATIONS.append((promise, first, rough, mutation))
        return mutation

    return register


def without_sync(patch: Patch, place: str, *, folders: bool) -> None:
    """Lose the syncs of the files, or of the folders, that lie in ``place``."""
    sync = Synced.sync

    def careless(self: Synced, descriptor: int) -> None:
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if f"/{place}" not in path or Path(path).is_dir() != folders:
            sync(self, descriptor)

    patch.setattr(Synced, "sync", careless)


@breaks(1, first=10)
def acknowledge_before_the_payload_is_synced(patch: Patch) -> None:
    without_sync(patch, "server", folders=False)


@breaks(1, first=7)
def acknowledge_before_the_names_are_synced(patch: Patch) -> None:
    without_sync(patch, "server", folders=True)


@breaks(1, first=7)
def forget_uploads_at_a_restart(patch: Patch) -> None:
    sweep = Spools.sweep

    async def everything(self: Spools, keeps: Any, run: str | None = None) -> None:  # noqa: ANN401
        await sweep(self, (lambda *_: ()) if run is None else keeps, run)

    patch.setattr(Spools, "sweep", everything)


@breaks(1, first=1)
def acknowledge_before_recording(patch: Patch) -> None:
    async def unheard(self: Engine, expected: Any, spool: Any) -> Any:  # noqa: ANN401
        from fsllm.v1.federation_pb2 import Receipt

        runner = self._runners[expected.run_id]
        runner.post(self._uploads.event(expected, spool))
        return Receipt(digest=spool.manifest.digest, payload_bytes=spool.manifest.payload_bytes)

    patch.setattr(Engine, "record_upload", unheard)


@breaks(2, first=15)
def record_a_retry_again(patch: Patch) -> None:
    updated = core._updated

    def reopened(turn: Turn, event: Any) -> None:  # noqa: ANN401
        order = turn.run.orders.get(event.order_id)
        updated(turn, event)
        if order is not None and order.kind == "train":
            turn.update(orders={**turn.run.orders, order.id: order})

    patch.setattr(core, "recorded", lambda run, round_, member: None)
    patch.setattr(core, "_updated", reopened)


def _of_other_updates(patch: Patch, chosen: Callable[[Any], Any]) -> None:
    """Have the sum be one of other updates than it is given, or in another order."""
    begin = WeightedSum.__init__

    def begin_with(self: WeightedSum, updates: Any, shares: Any, *rest: Any) -> None:  # noqa: ANN401
        begin(self, chosen(updates), chosen(shares), *rest)

    patch.setattr(WeightedSum, "__init__", begin_with)


@breaks(3, first=2)
def leave_the_last_update_out(patch: Patch) -> None:
    _of_other_updates(patch, lambda updates: updates[:-1] or updates)


@breaks(3, first=3)
def weigh_all_the_same(patch: Patch) -> None:
    patch.setattr(FedAvg, "weigh", lambda self, updates: [1 / len(updates)] * len(updates))


@breaks(3, first=3)
def add_in_the_order_of_arrival(patch: Patch) -> None:
    _of_other_updates(patch, lambda updates: updates[::-1])


@breaks(4)
def train_from_version_zero_for_ever(patch: Patch) -> None:
    patch.setattr(Run, "latest", property(lambda self: self.commits[0].version if self.commits else None))


@breaks(4, first=2)
def commit_a_version_that_a_power_loss_takes(patch: Patch) -> None:
    without_sync(patch, "blobs", folders=True)


@breaks(5, first=15, rough="liar")
def record_what_was_not_verified(patch: Patch) -> None:
    patch.setattr(Spool, "_checked", lambda self, manifest, max_norm: 0.0)


@breaks(5, first=36)
def publish_before_it_is_synced(patch: Patch) -> None:
    without_sync(patch, "blobs", folders=False)


@breaks(6, first=5, rough="sites")
def train_again_what_is_in_the_outbox(patch: Patch) -> None:
    patch.setattr(Outbox, "find", lambda self, run_id, round_, base_digest: None)


@breaks(6, first=5, rough="sites")
def send_before_the_parcel_is_durable(patch: Patch) -> None:
    commit = Outbox.commit
    patch.setattr(Outbox, "commit", lambda self, begin, durable=True: commit(self, begin, durable=False))


@breaks(6, first=14)
def send_again_from_zero(patch: Patch) -> None:
    begin = Spools.open

    def afresh(self: Spools, run: str, round_: int, member: str, manifest: Any) -> Spool:  # noqa: ANN401
        shutil.rmtree(self.folder / run / str(round_) / member, ignore_errors=True)
        return begin(self, run, round_, member, manifest)

    patch.setattr(Spools, "open", afresh)


@breaks(6, first=11, rough="")
def send_no_order_again(patch: Patch) -> None:
    attached = Engine._attached

    def as_if_held(self: Engine, session: Any, run_id: str) -> Any:  # noqa: ANN401
        event = attached(self, session, run_id)
        held = tuple(order.id for order in self._runners[run_id].run.orders_of(session.member))
        return event.model_copy(update={"held": held})

    patch.setattr(Engine, "_attached", as_if_held)


@breaks(6, first=76, rough="")
def count_without_a_receipt(patch: Patch) -> None:
    save = Kept.save
    patch.setattr(
        Kept, "save", lambda self, round_number, tensors, acknowledged=True: save(self, round_number, tensors)
    )


@breaks(6, first=5, rough="sites")
def keep_a_state_in_a_folder_that_is_not_durable(patch: Patch) -> None:
    patch.setattr(work, "make_folder", lambda folder: folder.mkdir(parents=True, exist_ok=True))


@breaks(7, first=3)
def forget_who_submitted(patch: Patch) -> None:
    add = Engine._add

    def forgetting(self: Engine, record: Any, entries: Any) -> Any:  # noqa: ANN401
        runner = add(self, record, entries)
        self._submissions._known.clear()
        return runner

    patch.setattr(Engine, "_add", forgetting)


@breaks(7, first=10)
def fail_without_a_name(patch: Patch) -> None:
    receipt = uploads.Uploads.receipt

    def careless(self: uploads.Uploads, *what: Any) -> Any:  # noqa: ANN401
        if (found := receipt(self, *what)) is not None:
            raise KeyError(found.payload_bytes)
        return None

    patch.setattr(uploads.Uploads, "receipt", careless)


@breaks(7, first=10)
def refuse_what_is_recorded(patch: Patch) -> None:
    patch.setattr(uploads.Uploads, "receipt", lambda self, *what: None)


@breaks(8, first=12, rough="")
def admit_one_more(patch: Patch) -> None:
    begin = Admission.__init__
    patch.setattr(Admission, "__init__", lambda self, slots, metrics: begin(self, slots + 1, metrics))


@breaks(8)
def leave_spools_open(patch: Patch) -> None:
    patch.setattr(Spool, "close", lambda self: None)


@breaks(8, first=13, rough="sites")
def let_results_lie(patch: Patch) -> None:
    async def idly(self: Deliveries, turns: object) -> None:
        pass

    patch.setattr(Deliveries, "tidy", idly)


@breaks(9, first=14, rough="liar")
def take_any_shape(patch: Patch) -> None:
    patch.setattr(manifest, "compatible", lambda *_: None)


@breaks(9, first=3, rough="liar")
def take_any_base(patch: Patch) -> None:
    expect = uploads.Uploads.expect

    def trusting(self: uploads.Uploads, runner: Any, member: str, begin: Any) -> Any:  # noqa: ANN401
        with suppress(FsllmError):
            order = core.wanted_order(runner.run, member, begin.order_id, begin.round)
            begin.base_digest = bytes.fromhex(order.base.digest) if order.base is not None else b""
        return expect(self, runner, member, begin)

    patch.setattr(uploads.Uploads, "expect", trusting)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("promise", "first", "rough", "mutation"), MUTATIONS, ids=[mutation.__name__ for *_, mutation in MUTATIONS]
)
def test_a_mutation_breaks_its_promise(
    promise: int, first: int, rough: Rough, mutation: Mutation, monkeypatch: Patch
) -> None:
    mutation(monkeypatch)
    # Other seeds for each promise, so that none is tuned to a few.
    begin = 10_000 + 1000 * promise + first
    for seed in range(begin, begin + SEEDS):
        broken = {violation.promise for violation in run.play(seed, rough=rough).violations}
        if promise in broken:
            return
    pytest.fail(f"no seed of {SEEDS} has noticed")
