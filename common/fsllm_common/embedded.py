"""Where the project's own tiny model lies."""

import importlib.util
from pathlib import Path


def embedded_model() -> Path | None:
    """Return the folder of the embedded model, if it is installed. Its package itself is not imported."""
    spec = importlib.util.find_spec("fsllm_bench")
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(spec.submodule_search_locations[0]) / "embedded" / "model"
