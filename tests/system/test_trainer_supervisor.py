"""The trainer's worker as the daemon has it: exec'ed, one rank and two, killed, starved and orphaned."""

import asyncio
import contextlib
import json
import os
import resource
import select
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import psutil
import pytest
from safetensors.numpy import load_file

from fsllm_client.trainer.orders import Advanced, Build, Evaluate, Prepare, Train
from fsllm_client.trainer.supervisor import Trainer
from fsllm_common.errors import FsllmError, ModelUnusable, TrainingFailed
from fsllm_common.plan import Plan

pytestmark = pytest.mark.slow

MakeTrainer = Callable[..., Trainer]


def _plan(stage: int = 2, steps: int = 2, **train: object) -> Plan:
    defaults = {
        "steps": steps,
        "batch_size": 6,
        "micro_batch_size": 2,
        "precision": "fp32",
        "learning_rate": 0.1,
        "optimizer": "sgd",
    }
    return Plan.model_validate(
        {
            "name": "t",
            "model": {"name": "tiny"},
            "adapter": {"rank": 3},
            "algorithm": {"name": "fedprox", "parameters": {"mu": 0.5}},
            "train": {**defaults, **train},
            "deepspeed": {"zero_stage": stage},
            "data": {"template": "plain", "max_length": 24, "packing": False, "validation_fraction": 0.2},
            "evaluate": {"metrics": ["loss", "exact_match"], "max_new_tokens": 4, "limit": 5},
        }
    )


@pytest.fixture
async def trainer(tmp_path: Path, extensions: Path) -> AsyncIterator[MakeTrainer]:
    made: list[Trainer] = []

    def make(ranks: int = 1, **settings: object) -> Trainer:
        state = tmp_path / f"state-{len(made)}"
        state.mkdir()
        made.append(Trainer(state, ranks=ranks, threads=1, extensions=extensions, **settings))
        return made[-1]

    yield make
    for one in made:
        await one.stop(grace=1)


@pytest.fixture
def prepare(tiny_model: Path, tiny_rows: Path) -> Callable[..., Prepare]:
    def order(plan: Plan, **changes: object) -> Prepare:
        given = {"run_id": "r", "plan": plan, "model": tiny_model, "data": tiny_rows, "role": "site"}
        return Prepare(**{**given, **changes})

    return order


def _pids(one: Trainer) -> list[int]:
    assert one._process is not None
    return [one._process.pid, *(rank.here.pid for rank in one._connected.values())]


def _address_space(pid: int) -> int:
    """Return the bytes of a process's address space."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * resource.getpagesize()


async def _gone(pids: list[int], seconds: float = 20) -> bool:
    """Wait until none of the processes is left."""

    def wait() -> bool:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                process = os.pidfd_open(pid)
                try:
                    if not select.select([process], [], [], seconds)[0]:
                        return False
                finally:
                    os.close(process)
        return True

    return await asyncio.to_thread(wait)


async def test_the_whole_life_of_a_worker(
    trainer: MakeTrainer, prepare: Callable[..., Prepare], tmp_path: Path
) -> None:
    one = trainer()
    base, delta = tmp_path / "v0.safetensors", tmp_path / "delta.safetensors"
    reports: list[Advanced] = []
    ready = prepare(_plan(steps=3000))
    prepared = await one.run(ready, reports.append)
    assert prepared.counts["parameters"] > 0
    assert {report.activity for report in reports} == {"reading", "loading"}
    assert (one.log.parent / "socket").stat().st_mode & 0o777 == 0o600
    assert one.log.parent.stat().st_mode & 0o777 == 0o700
    assert await one.run(ready) == prepared  # at once
    await one.run(Build(adapter=base))
    order = Train(round=1, base=base, delta=delta)
    first_worker = _pids(one)

    # Cancelled by the daemon, and by cancelling the task that waits for it: the worker stays.
    def cancel(report: Advanced) -> None:
        one.cancel()

    with pytest.raises(FsllmError) as caught:
        await one.run(order, cancel)
    assert caught.value.reason == "ORDER_UNKNOWN"
    started = asyncio.Event()
    task = asyncio.create_task(one.run(order, lambda _: started.set()))
    await started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (await one.run(Evaluate(adapter=base))).counts["examples"] == 5
    assert _pids(one) == first_worker

    # Killed in the midst of a round.
    def kill(report: Advanced) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(first_worker[0], signal.SIGKILL)

    with pytest.raises(TrainingFailed, match=r"killed \(SIGKILL\) during: train") as killed:
        await one.run(order, kill)
    assert killed.value.reason == "WORKER_DIED"
    assert str(one.log) in killed.value.message
    assert not one.alive
    assert not delta.exists()

    # The next order starts a new worker and prepares it.
    assert (await one.run(Evaluate(adapter=base))).counts["examples"] == 5
    second_worker = _pids(one)
    assert second_worker != first_worker

    # Without a GPU the worker itself changes to another run; memory that runs out in it is told from death.
    assert (await one.run(prepare(_plan(batch_size=30, micro_batch_size=30), run_id="s"))).counts["ranks"] == 1
    assert _pids(one) == second_worker
    held = _address_space(second_worker[0])
    resource.prlimit(second_worker[0], resource.RLIMIT_AS, (held + (1 << 20), resource.RLIM_INFINITY))
    with pytest.raises(TrainingFailed) as starved:
        await one.run(order)
    assert starved.value.reason == "OUT_OF_MEMORY"
    assert await _gone(second_worker)

    await one.run(order)
    assert delta.exists()
    third_worker = _pids(one)
    await one.stop()
    assert not one.alive
    assert await _gone(third_worker)


async def test_two_ranks_train_and_measure_what_one_does_in_every_stage(
    trainer: MakeTrainer, prepare: Callable[..., Prepare], tmp_path: Path
) -> None:
    found = []
    base = tmp_path / "v0.safetensors"
    for ranks, stage in ((1, 2), (2, 1), (2, 2), (2, 3)):
        # Under ZeRO-3 small tensors are kept whole, unless a site's own settings say otherwise.
        settings = tmp_path / "ds.json"
        settings.write_text(
            json.dumps({"zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0}})
        )
        one = trainer(ranks)
        delta = tmp_path / "delta.safetensors"
        # Five sequences a step, two a pass: the ranks' shares differ, and one pass is idle.
        assert (await one.run(prepare(_plan(batch_size=5), deepspeed_config=settings))).counts["ranks"] == ranks
        if ranks == 1:
            await one.run(Build(adapter=base))
        trained = await one.run(Train(round=1, base=base, delta=delta))
        measured = await one.run(Evaluate(adapter=base))
        found.append((load_file(delta), trained, measured))
        await one.stop()
    (alone, trained_alone, measured_alone), *others = found
    assert max(abs(alone[name]).max() for name in alone) > 1e-3
    for shared, trained_shared, measured_shared in others:
        assert alone.keys() == shared.keys()
        assert max(abs(alone[name] - shared[name]).max() for name in alone) < 2e-6
        assert trained_alone.counts == trained_shared.counts
        assert trained_alone.metrics["train_loss"] == pytest.approx(trained_shared.metrics["train_loss"], rel=1e-5)
        assert measured_alone.counts == measured_shared.counts
        assert measured_alone.metrics["loss"] == pytest.approx(measured_shared.metrics["loss"], rel=1e-5)
        assert measured_alone.metrics["exact_match"] == measured_shared.metrics["exact_match"]


_A_DAEMON = """
import asyncio, sys
from pathlib import Path
from fsllm_client.trainer.supervisor import Trainer

async def main():
    trainer = Trainer(Path(sys.argv[1]), ranks=int(sys.argv[2]))
    await trainer.start()
    print(trainer._process.pid, *(rank.here.pid for rank in trainer._connected.values()), flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


@pytest.mark.parametrize("ranks", [1, 2])
async def test_no_worker_outlives_a_daemon_that_is_killed(ranks: int, tmp_path: Path) -> None:
    daemon = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", _A_DAEMON, str(tmp_path), str(ranks)), stdout=subprocess.PIPE
    )
    assert daemon.stdout is not None
    pids = [int(pid) for pid in (await daemon.stdout.readline()).split()]
    assert len(set(pids)) == (1 if ranks == 1 else 3)
    daemon.kill()
    await daemon.wait()
    assert await _gone(pids)


async def test_no_rank_outlives_a_launcher_or_a_fellow_that_is_killed(trainer: MakeTrainer) -> None:
    one = trainer(ranks=2)
    for victim in (0, 2):  # torchrun itself, whose ranks killpg would miss; then a rank
        await one.start()
        pids = _pids(one)
        os.kill(pids[victim], signal.SIGKILL)
        assert await _gone(pids)


async def test_what_can_not_be_prepared_comes_back_as_its_error_and_the_worker_is_not_kept(
    trainer: MakeTrainer, prepare: Callable[..., Prepare], tmp_path: Path
) -> None:
    one = trainer()
    with pytest.raises(ModelUnusable, match="does not exist") as caught:
        await one.run(prepare(_plan(), model=tmp_path / "absent"))
    assert caught.value.reason == "MODEL_MISSING"
    assert not one.alive


async def test_a_worker_that_can_not_start_is_an_error_with_its_log(trainer: MakeTrainer) -> None:
    one = trainer(given={"PYTHONHOME": "/nowhere"})
    with pytest.raises(TrainingFailed, match=r"exit code \d+ while it started; see ") as caught:
        await one.start()
    assert caught.value.reason == "WORKER_DIED"
    assert one.log.stat().st_size > 0


async def test_a_worker_that_is_slow_to_start_is_waited_for_and_one_that_does_nothing_is_not(
    trainer: MakeTrainer,
) -> None:
    slow = trainer(start_seconds=3.0)
    await slow.start()  # its imports alone take seconds
    assert slow.alive

    stuck = trainer(start_seconds=3.0)
    starting = asyncio.create_task(stuck.start())
    while stuck._process is None:  # noqa: ASYNC110 (nothing tells of it)
        await asyncio.sleep(0)
    os.kill(stuck._process.pid, signal.SIGSTOP)
    with pytest.raises(TrainingFailed, match="did nothing for 3 s"):
        await starting
    assert not stuck.alive


async def test_ranks_that_do_nothing_are_given_up_though_their_launcher_looks_after_them(trainer: MakeTrainer) -> None:
    stuck = trainer(2, start_seconds=3.0)
    starting = asyncio.create_task(stuck.start())
    ranks: list[psutil.Process] = []
    while len(ranks) < 2:
        await asyncio.sleep(0.1)
        ranks = psutil.Process(stuck._process.pid).children() if stuck._process is not None else []
    for rank in ranks:
        rank.suspend()
    with pytest.raises(TrainingFailed, match="did nothing for 3 s"):
        await starting
    assert not stuck.alive


async def test_a_state_folder_too_deep_for_a_socket_will_do(tmp_path: Path) -> None:
    state = tmp_path / ("d" * 120)
    state.mkdir()
    one = Trainer(state)
    await one.start()
    assert one.alive
    folder = one._socket_folder
    assert folder is not None
    assert folder.stat().st_mode & 0o777 == 0o700
    await one.stop()
    assert not folder.exists()
