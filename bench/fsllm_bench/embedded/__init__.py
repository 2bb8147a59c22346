"""The language model and the instruction data that travel inside the package.

A demonstration or a test of fsllm needs a model that was really pretrained and data that
really differ between institutions, on a machine that may reach no model hub. Both are made
here from nothing but a seed: `lexicon` is the small world, `tasks` asks about it in the form
of instructions, `corpus` tells it as plain text, and `pretrain` turns that text into `model/`.
"""

from pathlib import Path

__all__ = ["model_path"]


def model_path() -> Path:
    """Return the folder of the packaged model, as `from_pretrained` takes it."""
    return Path(__file__).resolve().parent / "model"
