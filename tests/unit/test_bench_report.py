"""The benchmarks' page: a section is replaced, and nothing else of the page."""

from pathlib import Path

import pytest

from fsllm_bench.floor import floor
from fsllm_bench.report import markdown, write_section
from fsllm_bench.rounds import Measured, round_seconds
from fsllm_common.errors import InputError


def test_a_section_replaces_the_last_one_and_leaves_the_rest(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- rounds:begin -->\nold\n<!-- rounds:end -->\nafter\n")
    write_section(page, "rounds", ["make bench"], markdown(["a", "b"], [["1", "2"]]))
    write_section(page, "rounds", ["make bench"], markdown(["a", "b"], [["3", "4"]]))
    text = page.read_text()
    assert text.startswith("before\n<!-- rounds:begin -->\n`make bench`, ")
    assert text.endswith("| a | b |\n| ---: | ---: |\n| 3 | 4 |\n<!-- rounds:end -->\nafter\n")
    assert "old" not in text
    assert "| 1 | 2 |" not in text


def test_a_page_without_the_section_is_not_touched(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("nothing here\n")
    with pytest.raises(InputError, match="peers:begin"):
        write_section(page, "peers", [], "")
    assert page.read_text() == "nothing here\n"


def test_a_round_is_the_time_between_two_commits() -> None:
    at = ["2026-01-01T00:00:00+00:00", "2026-01-01T00:00:01.500000+00:00", "2026-01-01T00:00:04+00:00"]
    assert round_seconds({"commits": [{"at": time} for time in at]}) == [1.5, 2.5]


def test_a_cell_tells_how_far_it_is_from_the_floor() -> None:
    assert Measured(8, 2, 0.3, 0.2, 0.1, 140, 193).ratio == pytest.approx(1.5)


@pytest.mark.slow
def test_the_floor_moves_the_bytes() -> None:
    assert 0 < floor(2, 1.5, 2) < 60
