"""The committed protobuf code is what the .proto files give, and these obey buf's rules."""

import filecmp
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
GENERATED = ROOT / "protos" / "fsllm" / "v1"


def tool(name: str) -> str:
    """A tool of the environment that runs the tests, which need not be on PATH."""
    found = shutil.which(name, path=str(Path(sys.executable).parent))
    assert found, f"{name} is not installed beside {sys.executable}: pip install -e '.[dev]'"
    return found


def test_the_committed_code_is_what_the_protos_give(tmp_path: Path) -> None:
    # protoc looks for its mypy plugins on PATH.
    done = subprocess.run(
        [sys.executable, ROOT / "protos" / "generate.py", tmp_path],
        env={"PATH": f"{Path(tool('protoc-gen-mypy')).parent}:/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    made = sorted(path.name for path in (tmp_path / "fsllm" / "v1").iterdir())
    committed = sorted(path.name for path in GENERATED.iterdir() if "_pb2" in path.name)
    assert made == committed
    assert {name.partition("_pb2")[0] for name in made} == {path.stem for path in GENERATED.glob("*.proto")}
    same, different, failed = filecmp.cmpfiles(tmp_path / "fsllm" / "v1", GENERATED, made, shallow=False)
    assert (different, failed) == ([], []), "run: python protos/generate.py"
    assert len(same) == len(made)


@pytest.mark.parametrize("arguments", [["lint"], ["format", "--diff", "--exit-code"]])
def test_buf_is_content(arguments: list[str], tmp_path: Path) -> None:
    done = subprocess.run(
        [tool("buf"), *arguments],
        cwd=ROOT,
        env={"HOME": str(tmp_path), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
