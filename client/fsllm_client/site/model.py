"""The base model's weights as one number, so that all sites of a run can be held to the same model."""

from collections.abc import Callable
from pathlib import Path
from typing import Final

from blake3 import blake3

from fsllm_common.errors import ModelUnusable

_WEIGHTS: Final = ("*.safetensors", "*.bin", "*.gguf", "*.pt", "*.pth")


def weight_files(folder: Path) -> list[Path]:
    """Return a model folder's weight files by name: safetensors, or where there are none files of other formats.

    Raises:
        ModelUnusable: MODEL_MISSING: the folder holds none, or can not be read.

    """
    try:
        for pattern in _WEIGHTS:
            if found := sorted(path for path in folder.glob(pattern) if path.is_file()):
                return found
    except OSError as error:
        raise ModelUnusable("MODEL_MISSING", f"{folder} can not be read: {error.strerror}") from error
    raise ModelUnusable("MODEL_MISSING", f"{folder} holds no weights ({', '.join(_WEIGHTS)})")


def model_digest(folder: Path, progress: Callable[[int, int], None] = lambda done, total: None) -> str:
    """Return BLAKE3, in hexadecimal, over each weight file's name, a zero byte, its size and its content, by name.

    Args:
        folder: The model's.
        progress: Called with bytes done and bytes in all after each file.

    Raises:
        ModelUnusable: MODEL_MISSING.

    """
    files = weight_files(folder)
    sizes = [path.stat().st_size for path in files]
    done = 0
    digest = blake3()
    for path, size in zip(files, sizes, strict=True):
        digest.update(path.name.encode() + b"\0" + size.to_bytes(8, "little"))
        digest.update_mmap(path)
        done += size
        progress(done, sum(sizes))
    return digest.hexdigest()


def check_model_digest(
    folder: Path, wanted: str, progress: Callable[[int, int], None] = lambda done, total: None
) -> None:
    """Compare a folder with the plan's ``model.digest``.

    Raises:
        ModelUnusable: MODEL_MISSING: other weights lie there, or none.

    """
    found = model_digest(folder, progress)
    if found != wanted:
        raise ModelUnusable(
            "MODEL_MISSING",
            f"The weights in {folder} have the digest {found}; the plan's model.digest is {wanted}",
            cure="Put the very model there that the plan means: compare `fsllm-client model digest FOLDER`.",
        )
