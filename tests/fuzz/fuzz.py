"""Fuzz what parses bytes from the wire: ``python tests/fuzz/fuzz.py -max_total_time=600 NEW_CORPUS tests/fuzz/corpus``.

Needs atheris. libFuzzer writes inputs that reach new code into the first folder, and one that breaks a property into
``crash-<hash>``: put that into ``tests/fuzz/corpus``, where the tests find it, and mend the cause.
"""

import sys
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).parent))

with atheris.instrument_imports(
    include=["fsllm_common.tensors", "fsllm_common.text", "fsllm_server.service.screening"]
):
    import targets


def main() -> None:
    """Run libFuzzer."""
    atheris.Setup(sys.argv, targets.one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
