"""The corpus that ``fuzz.py`` has gathered, and more bytes by hypothesis, against the properties of ``targets``."""

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.fuzz import targets

CORPUS = sorted((Path(__file__).parent / "corpus").iterdir())


def test_the_corpus_reaches_every_target() -> None:
    assert {path.read_bytes()[0] % len(targets.TARGETS) for path in CORPUS} == set(range(len(targets.TARGETS)))


def test_the_corpus() -> None:
    for path in CORPUS:
        try:
            targets.one_input(path.read_bytes())
        except Exception as error:
            raise AssertionError(path.name) from error


@pytest.mark.parametrize("target", targets.TARGETS, ids=lambda target: target.__name__)
@given(data=st.binary(max_size=200))
@settings(max_examples=300, deadline=None)
def test_any_bytes(target: Callable[[bytes], None], data: bytes) -> None:
    target(data)


@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_bytes_near_the_corpus(data: st.DataObject) -> None:
    """One of the corpus with a piece cut out, replaced or put in."""
    known = data.draw(st.sampled_from(CORPUS)).read_bytes()
    start = data.draw(st.integers(0, len(known)))
    end = data.draw(st.integers(start, min(len(known), start + 8)))
    targets.one_input(known[:start] + data.draw(st.binary(max_size=8)) + known[end:])
