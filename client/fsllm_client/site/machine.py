"""What this host has: GPUs, memory, the training stack. Found out without importing torch."""

import importlib.util
import os
import subprocess
from dataclasses import dataclass
from shutil import which
from typing import Final, Self

from fsllm_client.trainer.launch import gpus

_STACK: Final = ("torch", "transformers", "peft", "deepspeed", "opacus")
_QUERY: Final = ("--query-gpu=name,memory.total", "--format=csv,noheader,nounits")
_SECONDS: Final = 10.0


@dataclass(frozen=True, slots=True)
class Machine:
    """The host's means."""

    gpus: int
    gpu_names: tuple[str, ...]
    gpu_memory_bytes: int
    """Of the smallest GPU."""
    host_memory_bytes: int
    missing: tuple[str, ...]
    """Packages of the training stack that are not installed."""

    @property
    def trainer(self) -> bool:
        """Whether this host can train."""
        return not self.missing

    @classmethod
    def look(cls) -> Self:
        """Look at the host this process runs on."""
        count = gpus()
        rows = _nvidia_rows() if count else []
        return cls(
            gpus=count,
            gpu_names=tuple(name for name, _ in rows),
            gpu_memory_bytes=min((memory for _, memory in rows), default=0),
            host_memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            missing=tuple(name for name in _STACK if importlib.util.find_spec(name) is None),
        )


def _nvidia_rows() -> list[tuple[str, int]]:
    """Return name and bytes of memory of each GPU that NVIDIA's driver shows."""
    program = which("nvidia-smi")
    if program is None:
        return []
    try:
        answer = subprocess.run([program, *_QUERY], capture_output=True, text=True, timeout=_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [line.rpartition(",") for line in answer.stdout.splitlines() if "," in line]
    return [(name.strip(), int(float(memory)) * 2**20) for name, _, memory in rows]
