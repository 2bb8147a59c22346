"""Where the real code touches the world (time, chance, disk, log), and what the simulation puts there instead."""

# ruff: noqa: S311 - it is to be repeatable.

import asyncio
import functools
import os
import random
import secrets
import time
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from contextvars import copy_context
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NoReturn
from unittest import mock

import structlog

from fsllm_client import daemon
from fsllm_client.link import attach, backoff, upload
from fsllm_client.reporting import Reporter
from fsllm_client.site.machine import Machine
from fsllm_client.trainer import kept
from fsllm_common import failpoints
from fsllm_common.errors import Unavailable
from fsllm_common.files import write_atomic
from fsllm_common.identity import credentials
from fsllm_common.identity.keys import Certificate
from fsllm_common.plan import plan_from_json
from fsllm_common.telemetry.metrics import ClientMetrics, ServerMetrics
from fsllm_common.tensors import arrays, chunks
from fsllm_server.engine import runner
from fsllm_server.reduce import blocks, fold
from fsllm_server.reduce import sum as sum_reducer
from fsllm_server.service import guard, rates, uploads
from simulation.loop import CURRENT

if TYPE_CHECKING:
    from simulation.world import World

CHUNK = 64
"""Bytes; a payload of the simulation has a few."""
BLOCK = 16
"""Elements."""
SERVER_METRICS = ServerMetrics()
CLIENT_METRICS = ClientMetrics()
_MACHINE = Machine(gpus=0, gpu_names=(), gpu_memory_bytes=0, host_memory_bytes=1 << 30, missing=())


@contextmanager
def virtual(world: "World") -> Iterator[None]:
    """Put the world's clock, chance, disk and failpoints in the place of the real ones."""
    loop, chance = world.loop, random.Random(world.chance.random())

    def clock() -> float:
        return loop.now

    with ExitStack() as stack:

        def replace(target: Any, name: str, value: object) -> None:  # noqa: ANN401
            stack.enter_context(mock.patch.object(target, name, value))

        replace(time, "monotonic", clock)
        replace(time, "time", lambda: 1.7e9 + loop.now)
        for function in (Reporter.__init__, rates.Rate.__init__, rates.CallRate.__init__):
            stack.enter_context(mock.patch.dict(function.__kwdefaults__, clock=clock))
        replace(secrets, "token_hex", lambda size=16: chance.randbytes(size).hex())
        replace(secrets, "randbits", chance.getrandbits)
        replace(backoff, "random", SimpleNamespace(Random=lambda: random.Random(chance.random())))
        for module in (chunks, uploads, upload):
            replace(module, "CHUNK", CHUNK)
        for module in (arrays, blocks, fold, sum_reducer):
            replace(module, "BLOCK", BLOCK)
        # A run's task begins in an empty context; here the context is who runs.
        replace(runner, "Context", copy_context)
        # Sets of calls are walked in the order of their addresses otherwise.
        replace(guard.Call, "__hash__", lambda call: hash(call.task))
        # The client: certificates never expire here, nobody knocks, metrics are made once.
        replace(attach, "check_credential", lambda credential: None)
        replace(attach, "knock", _nobody)
        replace(daemon, "keep_renewed", _never)
        replace(daemon, "ClientMetrics", lambda: CLIENT_METRICS)
        stack.enter_context(mock.patch.object(Machine, "look", return_value=_MACHINE))
        # The trainer pretends, and so does what it keeps: nothing here has torch.
        replace(kept, "write_tensors", lambda path, tensors: write_atomic(path, repr(tensors).encode()))
        # Pure, and done thousands of times.
        replace(daemon, "plan_from_json", _plan)
        replace(credentials, "Certificate", SimpleNamespace(parse=_certificate))
        _disk(world, replace)
        failpoints.listen(world.reached)
        stack.callback(failpoints.listen, None)
        stack.enter_context(_logging(world))
        yield


_plan = functools.cache(plan_from_json)
_certificate = functools.cache(Certificate.parse)


def _nobody(*_: object) -> NoReturn:
    raise Unavailable("SERVER_UNREACHABLE", "nobody answers a knock here")


async def _never(*_: object) -> None:
    await asyncio.get_running_loop().create_future()


def _disk(world: "World", replace: Callable[[Any, str, object], None]) -> None:
    real_pwrite, real_statvfs = os.pwrite, os.statvfs

    def full() -> bool:
        process = CURRENT.get()
        return process is not None and process.full_until > world.loop.now

    def pwrite(descriptor: int, data: Any, offset: int) -> int:  # noqa: ANN401
        if full():
            raise OSError(28, "No space left on device")
        return real_pwrite(descriptor, data, offset)

    def statvfs(path: Any) -> os.statvfs_result:  # noqa: ANN401
        found = list(real_statvfs(path))
        if full():
            found[3] = found[4] = 0
        return os.statvfs_result(found)

    replace(os, "pwrite", pwrite)
    replace(os, "statvfs", statvfs)
    replace(os, "fsync", world.synced.sync)
    replace(os, "fdatasync", world.synced.sync)


@contextmanager
def silenced() -> Iterator[None]:
    """Log nothing."""
    with _logging_to(_drop, 50):
        yield


def _drop(*_: object) -> NoReturn:
    raise structlog.DropEvent


def _logging(world: "World") -> AbstractContextManager[None]:
    """Note what the code itself calls an error: a bug that it has caught, or one that it reports."""

    def take(_: object, level: str, event: MutableMapping[str, Any]) -> NoReturn:
        process = CURRENT.get()
        if process is None or process.alive:
            world.logged(level, event)
        raise structlog.DropEvent

    return _logging_to(take, 10 if world.verbose else 40)


@contextmanager
def _logging_to(take: Callable[..., NoReturn], level: int) -> Iterator[None]:
    before = structlog.get_config()
    structlog.configure(
        processors=[structlog.contextvars.merge_contextvars, take],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        cache_logger_on_first_use=False,
    )
    try:
        yield
    finally:
        structlog.configure(**before)
