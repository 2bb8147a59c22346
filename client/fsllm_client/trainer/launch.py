"""How the worker's process group is started: its command and its environment. Needs no torch."""

import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

_WORKER = "fsllm_client.trainer.worker"


def command(socket: Path, ranks: int) -> list[str]:
    """Return the command that starts the group: the worker itself, or torchrun with one worker a rank."""
    if ranks == 1:
        return [sys.executable, "-m", _WORKER, "--socket", str(socket)]
    return [
        *(sys.executable, "-m", "torch.distributed.run"),
        # A rendezvous of this host alone, on a port that is free, by an address that needs no name service.
        *("--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", str(ranks), "--max-restarts", "0"),
        *("-m", _WORKER, "--socket", str(socket)),
    ]


def processor_seconds(leader: int, ranks: int) -> float:
    """Return the processor time that a group has taken so far, as far as its processes still run.

    Of torchrun itself, which looks after its ranks whatever they do, only before they are there.

    Args:
        leader: The pid of what ``command`` has started.
        ranks: Of the group.

    """
    ticks: dict[int, int] = {}
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended since
            fields = stat.read_text(errors="replace").rpartition(")")[2].split()
            pid = int(stat.parent.name)
            ticks[pid] = int(fields[11]) + int(fields[12])
            children.setdefault(int(fields[1]), []).append(pid)
    group, found = children.get(leader, []), 0
    if ranks == 1 or not group:
        found = ticks.get(leader, 0)
    while group:
        found += sum(ticks[pid] for pid in group)
        group = [child for pid in group for child in children.get(pid, [])]
    return found / os.sysconf("SC_CLK_TCK")


def environment(
    *, extensions: Path, ranks: int, threads: int | None, gpu: bool, given: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Return the group's environment: the daemon's, with what training needs set.

    Args:
        extensions: Where DeepSpeed keeps what it compiles; one folder a service, so that no other's lock is waited for.
        ranks: Of the group.
        threads: OpenMP threads a rank; an even share of the cores when None.
        gpu: Whether this host has one.
        given: Set last, over everything.

    """
    share = max(1, len(os.sched_getaffinity(0)) // ranks)
    env = {
        **os.environ,
        "TORCH_EXTENSIONS_DIR": str(extensions),
        # ninja, which DeepSpeed's compiler needs, is installed beside the interpreter.
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
        # Nothing is fetched, and nothing imported from the folder the worker runs in.
        "HF_HUB_OFFLINE": "1",
        "PYTHONSAFEPATH": "1",
        # Nothing here is compiled by torch, and only to import its compiler takes 2 s.
        "TORCHDYNAMO_DISABLE": "1",
        "TOKENIZERS_PARALLELISM": "true",
        "OMP_NUM_THREADS": str(threads or share),
        # Spinning threads make steps ten times slower when several workers share cores.
        "OMP_WAIT_POLICY": "PASSIVE",
    }
    if not gpu:
        env["DS_ACCELERATOR"] = "cpu"
        env["CUDA_VISIBLE_DEVICES"] = ""
        env["GLOO_SOCKET_IFNAME"] = "lo"
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        env.pop(name, None)
    return {**env, **(given or {})}


def gpus() -> int:
    """Return how many NVIDIA or AMD GPUs this host lets us use, without importing torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([name for name in visible.split(",") if name.strip() and name.strip() != "-1"])
    nvidia = len([p for p in Path("/dev").glob("nvidia[0-9]*") if p.name.removeprefix("nvidia").isdigit()])
    return nvidia or (len(list(Path("/dev/dri").glob("renderD*"))) if Path("/dev/kfd").exists() else 0)
