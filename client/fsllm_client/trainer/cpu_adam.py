"""Build DeepSpeed's CPU Adam before it is needed: ``python -m fsllm_client.trainer.cpu_adam``.

DeepSpeed compiles it on first use, which takes minutes of silence; on a host without a GPU it compiles its
shared-memory collectives too. And a build that is killed leaves a file ``lock`` behind, for which every later process
waits for ever without a word (torch.utils.file_baton): so a lock that no live process holds is cleared, and said to be.
"""

import logging
import os
import subprocess  # for the exception that a failing compiler raises
import sys
from pathlib import Path

from fsllm_common.errors import SettingsInvalid

OPS = ("cpu_adam", "deepspeed_shm_comm")
"""Folders of the operators under TORCH_EXTENSIONS_DIR; the second only without a GPU."""

_log = logging.getLogger(__name__)


def is_built(extensions: Path) -> bool:
    """Tell whether CPU Adam lies compiled under ``extensions``."""
    return (extensions / OPS[0] / f"{OPS[0]}.so").is_file()


def clear_stale_locks(extensions: Path) -> list[Path]:
    """Remove the locks of builds that no live process holds, and return them."""
    stale = [lock for op in OPS if (lock := extensions / op / "lock").exists() and not _is_held(lock)]
    for lock in stale:
        lock.unlink(missing_ok=True)
        _log.warning("removed %s, left behind by a build that was killed", lock)
    return stale


def _is_held(lock: Path) -> bool:
    """Tell whether some process has the lock file open: a builder keeps it open from its creation to its removal."""
    wanted = str(lock.resolve())
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if any(os.readlink(entry) == wanted for entry in (process / "fd").iterdir()):
                return True
        except OSError:
            continue  # it ended meanwhile, or is another user's, who can not build in this service's folder
    return False


def build() -> None:
    """Compile the operators under TORCH_EXTENSIONS_DIR, or load them when they are compiled.

    Raises:
        SettingsInvalid: There is no working compiler.

    """
    extensions = Path(os.environ["TORCH_EXTENSIONS_DIR"])
    clear_stale_locks(extensions)
    if not is_built(extensions):
        _log.warning("compiling DeepSpeed's CPU Adam under %s: this takes minutes, once", extensions)
    # Lazy: 2 s and 240 MiB, and only this function needs them.
    import deepspeed
    from deepspeed.accelerator import get_accelerator
    from deepspeed.ops.op_builder import CPUAdamBuilder

    builders = [CPUAdamBuilder()]
    shared_memory = get_accelerator().create_op_builder("ShareMemCommBuilder")
    # The condition is that of deepspeed.comm.torch.build_shm_op.
    if shared_memory is not None and deepspeed.ops.__compatible_ops__.get(shared_memory.NAME, False):
        builders.append(shared_memory)
    try:
        for builder in builders:
            builder.load(verbose=False)
    except (RuntimeError, OSError, subprocess.CalledProcessError) as error:
        raise SettingsInvalid(
            f"DeepSpeed's operators can not be compiled under {extensions}: {str(error).splitlines()[0]}",
            cure="Install g++ and ninja, and try again with `python -m fsllm_client.trainer.cpu_adam`.",
        ) from error


def default_folder() -> Path:
    """Return where the operators lie when nothing says so: in the virtual environment if built there, or the cache."""
    beside = Path(sys.prefix) / "torch_extensions"
    return beside if beside.is_dir() else Path.home() / ".cache" / "fsllm" / "torch_extensions"


def main() -> int:
    """Build for this user, under TORCH_EXTENSIONS_DIR or the default folder."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(default_folder()))
    build()
    _log.info("CPU Adam is ready in %s", os.environ["TORCH_EXTENSIONS_DIR"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
