"""Tensors in safetensors files that appear whole or not at all."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from fsllm_common.files import replacing

if TYPE_CHECKING:
    import torch

_MODE = 0o600  # what a site has learnt is its own


def write_tensors(
    path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None, *, durable: bool = True
) -> None:
    """Write the tensors (on CPU): a reader, or a restart, finds the old file or the whole new one.

    Args:
        path: The file.
        tensors: By name.
        metadata: To stand in the file beside them.
        durable: As for ``files.replacing``.

    Raises:
        Unavailable: DISK_FULL, DISK_FAILED.

    """
    from safetensors.torch import save

    data = save({name: tensor.contiguous() for name, tensor in tensors.items()}, dict(metadata or {}))
    with replacing(path, mode=_MODE, durable=durable) as fresh:
        fresh.write_bytes(data)


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Read a safetensors file on to the CPU, floating point numbers as float32."""
    from safetensors.torch import load_file

    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in load_file(path).items()}


def read_metadata(path: Path) -> dict[str, str]:
    """Read the metadata of a safetensors file."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return dict(file.metadata() or {})
