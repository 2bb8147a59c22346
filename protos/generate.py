"""Regenerate the committed protobuf code: ``python protos/generate.py [OUTPUT_DIR]``.

The version of grpcio-tools that runs this sets the oldest grpcio and protobuf that can load the result, which is why
the ``dev`` extra pins an old one. ``tests/contract/test_protos.py`` fails when the committed code is another.
"""

import sys
from importlib import resources
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).parent


def generate(out: Path) -> None:
    """Write ``*_pb2.py``, ``*_pb2_grpc.py`` and their stubs under ``out/fsllm/v1``.

    Raises:
        SystemExit: protoc refused a file; it has printed why.

    """
    well_known = resources.files("grpc_tools") / "_proto"
    sources = sorted(str(p) for p in (ROOT / "fsllm" / "v1").glob("*.proto"))
    status = protoc.main(
        [
            "protoc",
            f"-I{ROOT}",
            f"-I{well_known}",
            f"--python_out={out}",
            f"--grpc_python_out={out}",
            f"--mypy_out={out}",
            f"--mypy_grpc_out={out}",
            *sources,
        ]
    )
    if status:
        raise SystemExit(status)


if __name__ == "__main__":
    generate(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT)
