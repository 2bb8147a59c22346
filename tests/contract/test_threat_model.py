"""docs/threat-model.md and docs/promises.md name tests and settings: they exist."""

import re
from pathlib import Path

import pytest

from fsllm_server.settings import ServerSettings

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", ["threat-model.md", "promises.md"])
def test_every_test_that_is_named_exists(name: str) -> None:
    text = (ROOT / "docs" / name).read_text()
    sources = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    assert [test for test in re.findall(r"`(test_\w+)`", text) if f"def {test}(" not in sources] == []
    paths = re.findall(r"`((?:unit|system|fault|fuzz|contract)/[\w./]*)`", text)
    assert paths
    assert [path for path in paths if not (ROOT / "tests" / path).exists()] == []


def test_every_setting_that_is_named_exists() -> None:
    text = (ROOT / "docs" / "threat-model.md").read_text()
    flags = {f"--{name.replace('_', '-')}" for name in ServerSettings.model_fields}
    assert set(re.findall(r"`(--[a-z-]+)`", text)) <= flags


def test_the_limits_that_are_stated_are_the_defaults() -> None:
    text = (ROOT / "docs" / "threat-model.md").read_text()
    stated = dict(re.findall(r"^\| `(--[a-z-]+)`[^|]*\| ([\d,]+ ?[KG]?)[^|]*\|", text, re.MULTILINE))
    assert len(stated) >= 9
    units = {"": 1, "K": 1 << 10, "G": 1 << 30}
    for flag, value in stated.items():
        number, _, unit = value.partition(" ")
        default = ServerSettings.model_fields[flag.removeprefix("--").replace("-", "_")].default
        assert default == int(number.replace(",", "")) * units[unit], flag
