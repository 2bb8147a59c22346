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


def breaking(folder: Path, image: Path, home: Path) -> subprocess.CompletedProcess[str]:
    """Compare the protos in ``folder`` with a release's."""
    return subprocess.run(
        [tool("buf"), "breaking", "--against", image],
        cwd=folder,
        env={"HOME": str(home), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )


RELEASES = sorted((ROOT / "protos" / "releases").glob("*.binpb"))


@pytest.mark.parametrize("image", RELEASES, ids=lambda path: path.stem)
def test_what_a_release_speaks_is_still_understood(image: Path, tmp_path: Path) -> None:
    done = breaking(ROOT, image, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("file", "before", "after", "words"),
    [
        ("tensors.proto", "uint64 offset = 1;", "string offset = 1;", 'changed type from "uint64" to "string"'),
        ("tensors.proto", "fixed32 crc32c = 2;", "", 'field "2" with name "crc32c" on message "Chunk" was deleted'),
        ("tensors.proto", "bytes data = 3;", "bytes payload = 3;", "changed name"),
        ("federation.proto", "bool duplicate = 3;", "bool duplicate = 4;", '"duplicate" on message "Receipt"'),
        ("control.proto", "RUN_STATUS_PAUSED = 2;", "RUN_STATUS_HELD = 2;", "RUN_STATUS_PAUSED"),
        (
            "federation.proto",
            "rpc UploadStatus(UploadStatusRequest) returns (UploadStatusResponse);",
            "",
            "UploadStatus",
        ),
    ],
)
def test_a_change_that_a_release_would_not_understand_is_found(
    file: str, before: str, after: str, words: str, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(ROOT / "protos", copy / "protos", ignore=shutil.ignore_patterns("*.py", "*.pyi", "__pycache__"))
    shutil.copy(ROOT / "buf.yaml", copy)
    path = copy / "protos" / "fsllm" / "v1" / file
    text = path.read_text()
    assert before in text
    path.write_text(text.replace(before, after))
    done = breaking(copy, RELEASES[-1], tmp_path)
    assert done.returncode == 100, done.stdout + done.stderr
    assert words in done.stdout
