"""The entry of each rank: ``python -m fsllm_client.trainer.worker --socket PATH``, which ``supervisor`` starts."""

import argparse
import ctypes
import logging
import os
import signal
import sys
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from fsllm_client.trainer.channel import Channel, Work
from fsllm_client.trainer.orders import Advanced, Finished, GaveUp, Here, Stop
from fsllm_client.trainer.session import Session
from fsllm_common.errors import FsllmError

if TYPE_CHECKING:
    from fsllm_client.trainer.group import Group

_log = logging.getLogger("fsllm_client.trainer")

_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")


def main() -> NoReturn:
    """Take orders until told to stop."""
    parser = argparse.ArgumentParser(prog="fsllm_client.trainer.worker")
    parser.add_argument("--socket", type=Path, required=True, help="where the daemon listens")
    socket_path: Path = parser.parse_args().socket
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    logging.basicConfig(level=logging.INFO, format=f"%(asctime)s rank {rank} %(levelname)s %(name)s: %(message)s")
    if world > 1:
        _die_with_parent()
    channel = Channel(socket_path)
    channel.send(Here(rank=rank, world=world, pid=os.getpid()))

    @cache
    def group() -> "Group":
        from fsllm_client.trainer.group import join  # imports torch

        return join(rank, world)

    def advanced(report: Advanced) -> None:
        if rank == 0:
            channel.send(report)

    session = Session(group, advanced, channel.cancelled)
    while not isinstance(order := channel.next_order(), Stop):
        _log.info("order: %s", order.kind)
        channel.send(_outcome(session, order))
        session.look_ahead()
    logging.shutdown()
    os._exit(0)  # torch takes seconds to take itself down, and holds nothing that the kernel does not


def _outcome(session: Session, order: Work) -> Finished | GaveUp:
    """Carry the order out. What has no known cause ends the process, with its trace in the log."""
    try:
        return session.carry_out(order)
    except FsllmError as error:
        _log.warning("gave up: %s", error)
        return GaveUp(reason=error.reason, message=error.message, cure=error.cure)
    except ModuleNotFoundError as error:
        return GaveUp(reason="TRAINER_MISSING", message=f"the module {error.name} is not installed")
    except MemoryError:
        return GaveUp(reason="OUT_OF_MEMORY", message=f"memory ran out during: {order.kind}")
    except RuntimeError as error:
        # torch's own error on a GPU, and a plain RuntimeError on a CPU.
        if not any(words in str(error).lower() for words in _OUT_OF_MEMORY):
            raise
        _log.exception("out of memory")
        return GaveUp(reason="OUT_OF_MEMORY", message=f"memory ran out during: {order.kind}")


def _die_with_parent() -> None:
    """Have the kernel kill this rank when the launcher dies: its process group is its own, which no kill reaches."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() == 1:
        sys.exit("the launcher died before this rank could watch it")


if __name__ == "__main__":
    main()
