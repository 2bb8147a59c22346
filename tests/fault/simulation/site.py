"""A virtual site: the real daemon over a virtual link, with a trainer that only pretends.

What the trainer makes is told to the world, which alone knows what a round must come to.
"""

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from fsllm.v1.federation_pb2 import Order
from fsllm_client.daemon import Daemon
from fsllm_client.reporting import Silent
from fsllm_client.settings import ClientSettings
from fsllm_client.trainer.kept import PRIVATE, Kept
from fsllm_client.trainer.orders import Account, Advanced, Build, Evaluate, Finished, Prepare, Train
from fsllm_common.accounting.budget import epsilon_of
from fsllm_common.errors import FsllmError, TrainingFailed
from fsllm_common.identity.names import Role
from fsllm_common.tensors.arrays import ADAPTER_CONFIG as CONFIG_KEY
from fsllm_common.tensors.arrays import save_arrays
from simulation import arithmetic
from simulation.identities import identity
from simulation.link import Link
from simulation.loop import CURRENT

if TYPE_CHECKING:
    from simulation.world import World


@dataclass
class Nature:
    """What a site is like."""

    name: str
    role: Role = Role.SITE
    step_seconds: float = 0.5
    steps: int = 4
    examples: int = 10
    fails: float = 0.0
    """How often training comes to nothing."""
    stalls: float = 0.0
    """How often it stops for a long time without a step."""
    declines: bool = False


class Trainer:
    """What the supervisor of the worker processes does, without any."""

    alive = True
    prepares = 0

    def __init__(self, world: "World", nature: Nature) -> None:
        self._world = world
        self._nature = nature
        self._prepared: Prepare | None = None

    async def stop(self) -> None:
        """There is no process."""

    async def run(self, order: object, on_progress: Callable[[Advanced], None] | None = None) -> Finished:
        advanced = on_progress or (lambda step: None)
        match order:
            case Prepare():
                if order != self._prepared:
                    await self._work("loading", 2, advanced)
                    self.prepares += 1
                self._prepared = order
                return Finished(counts={"train_rows": self._nature.examples})
            case Build(adapter=adapter):
                await self._work("building", 1, advanced)
                assert self._prepared is not None
                arrays = arithmetic.numbers(f"zero {self._prepared.plan.seed}", 0.02)
                save_arrays(arrays, adapter, metadata={CONFIG_KEY: arithmetic.ADAPTER_CONFIG})
                return Finished()
            case Train():
                return await self._train(order, advanced)
            case Evaluate():
                await self._work("evaluating", 2, advanced)
                return Finished(metrics={"loss": 2.0, "perplexity": 7.4}, counts={"examples": 5, "tokens": 50})
            case Account(multiplier=multiplier, releases=releases, delta=delta):
                return Finished(metrics={"epsilon": epsilon_of(multiplier, releases, delta)})
        raise AssertionError(order)

    async def _train(self, order: Train, advanced: Callable[[Advanced], None]) -> Finished:
        nature, world = self._nature, self._world
        assert self._prepared is not None
        run = self._prepared.run_id
        assert order.resume is not None
        kept = Kept(order.resume, PRIVATE)
        before, base = kept.origin(order.round), order.base.stem.rpartition("-")[2]
        world.history.note("training", run=run, round=order.round, base=base, state=before)
        await self._work("training", nature.steps, advanced)
        if world.chance.random() < nature.fails:
            raise TrainingFailed("OUT_OF_MEMORY", "the trainer pretends to be out of memory")
        delta = world.trained(nature, run, order.round)
        # As of a method whose state is right only beside an update that counts.
        kept.save(order.round, cast("Any", {"round": order.round}), acknowledged=False)
        save_arrays(delta, order.delta)
        counts = {"examples": nature.examples, "tokens": 7 * nature.examples, "steps": nature.steps}
        return Finished(counts=counts, metrics={"train_loss": 1.5, "tokens_per_second": 9.0})

    async def _work(self, activity: Any, steps: int, advanced: Callable[[Advanced], None]) -> None:  # noqa: ANN401
        for step in range(steps):
            seconds = self._nature.step_seconds * self._world.chance.uniform(0.5, 1.5)
            if self._world.chance.random() < self._nature.stalls:
                seconds += self._world.chance.uniform(20, 200)
            await asyncio.sleep(seconds)
            advanced(Advanced(activity=activity, done=step + 1, total=steps))


class SiteDaemon(Daemon):
    """The daemon, told of a trainer that is none."""

    def __init__(self, world: "World", nature: Nature, settings: ClientSettings) -> None:
        super().__init__(settings, Silent())
        self._world, self._nature = world, nature

    def _make_trainer(self) -> Any:  # noqa: ANN401
        return Trainer(self._world, self._nature)

    def ordered(self, order: Order) -> None:
        # Whatever is in hand is done or withdrawn in the end: so many at most.
        self._world.most("orders in hand", len(self._in_hand))
        super().ordered(order)

    async def serve(self, link: Link) -> None:
        async with AsyncExitStack() as stack:
            await self._serve(cast("Any", link), stack)


async def live(world: "World", nature: Nature) -> None:
    """Be the daemon's main, until it ends by a cause that waiting does not cure."""
    process = CURRENT.get()
    assert process is not None
    settings = ClientSettings(
        server="server:50051", data=world.files / "data", policy=policy(world, nature), state_dir=process.folder
    )
    try:
        await SiteDaemon(world, nature, settings).serve(Link(world, identity(nature.role, nature.name)))
    except FsllmError as error:
        world.history.note("ended", reason=error.reason)


def policy(world: "World", nature: Nature) -> Path:
    """Return the site's policy file."""
    path = world.files / f"{nature.name}.toml"
    if not path.exists():
        refusing = "[accept]\nalgorithms = []\n" if nature.declines else ""
        path.write_text(f'{refusing}[models]\nm = "{world.files / "model"}"\n')
    return path
