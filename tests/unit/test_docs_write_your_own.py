"""docs/write-your-own.md quotes a package that is really there, and names what fsllm really has."""

import re
from pathlib import Path

import pytest

from fsllm_common.algorithms import algorithm

DOCS = Path(__file__).parents[2] / "docs"
PAGE = DOCS / "write-your-own.md"
PACKAGE = DOCS / "examples" / "fsllm-lion"
QUOTE = re.compile(r"^<!-- (examples/\S+) -->\n```\w+\n(.*?)\n```$", re.DOTALL | re.MULTILINE)


def test_what_is_quoted_is_in_the_files() -> None:
    for name, block in QUOTE.findall(PAGE.read_text()):
        assert f"\n{block}\n" in "\n" + (DOCS / name).read_text(), f"not in {name}:\n{block}"


def test_all_code_is_quoted_and_every_file_is_in_the_page() -> None:
    page = PAGE.read_text()
    code = re.findall(r"^```(?:python|toml|yaml)$", page, re.MULTILINE)
    quoted = QUOTE.findall(page)
    assert len(code) == len(quoted)
    files = {str(path.relative_to(DOCS)) for path in PACKAGE.iterdir() if path.is_file()}
    assert {name for name, _ in quoted} == files


@pytest.mark.parametrize("file", sorted(path.name for path in PACKAGE.iterdir() if path.is_file()))
def test_each_whole_file_is_quoted_in_its_order(file: str) -> None:
    """Who copies the blocks of the page has the package that a test federates."""
    blocks = [block for name, block in QUOTE.findall(PAGE.read_text()) if name.endswith(f"/{file}")]
    assert "\n\n\n".join(blocks) + "\n" == (PACKAGE / file).read_text()


@pytest.mark.parametrize("line", [line for line in PAGE.read_text().splitlines() if re.match(r"\| .*\.py` \|$", line)])
def test_what_the_table_names_is_there(line: str) -> None:
    _, hooks, files = line.removeprefix("| ").removesuffix(" |").split(" | ")
    folder = Path(algorithm.__file__).parent
    interface = (folder / "algorithm.py").read_text() + (folder / "local_rule.py").read_text()
    texts = [(folder / name).read_text() for name in re.findall(r"`([\w.]+\.py)`", files)]
    assert texts
    for hook in re.findall(r"`(?:self\.)?(\w+)`", hooks):
        assert re.search(rf"(def |self\.|^    ){hook}\b", interface, re.MULTILINE), hook
        assert any(re.search(rf"\b{hook}\b", text) for text in texts), (hook, files)
