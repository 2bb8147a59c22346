"""Tensors in safetensors files that appear whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from fsllm_common.errors import Unavailable

if TYPE_CHECKING:
    import torch


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write the tensors (on CPU) durably: a reader, or a restart, finds the old file or the whole new one.

    Raises:
        Unavailable: DISK_FULL, when the file can not be written for want of space.

    """
    from safetensors.torch import save

    path.parent.mkdir(parents=True, exist_ok=True)
    data = save({name: tensor.contiguous() for name, tensor in tensors.items()}, dict(metadata or {}))
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise Unavailable("DISK_FULL", f"can not write {path}: {error.strerror}") from error


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Read a safetensors file on to the CPU, floating point numbers as float32."""
    from safetensors.torch import load_file

    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in load_file(path).items()}


def read_metadata(path: Path) -> dict[str, str]:
    """Read the metadata of a safetensors file."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return dict(file.metadata() or {})
