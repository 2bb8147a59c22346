"""The version of a state folder: begun with the newest, brought on step by step, never read when it is newer."""

from collections.abc import Callable
from pathlib import Path

import pytest

from fsllm_common.errors import FsllmError
from fsllm_common.layout import FILE, Layout


def recording(seen: list[int], fails: int = 0) -> Layout:
    """Return a layout of three versions whose steps note that they ran; the one from ``fails`` breaks off."""

    def step(number: int) -> Callable[[Path], None]:
        def run(root: Path) -> None:
            seen.append(number)
            if number == fails:
                raise KeyboardInterrupt

        return run

    return Layout(newest=3, steps={1: step(1), 2: step(2)}, begun="mark")


def test_a_new_folder_begins_with_the_newest(tmp_path: Path) -> None:
    seen: list[int] = []
    recording(seen).migrate(tmp_path)
    assert (seen, (tmp_path / FILE).read_text()) == ([], "3\n")


def test_an_old_folder_is_brought_on_from_where_it_stands(tmp_path: Path) -> None:
    (tmp_path / "mark").touch()  # and no number: of layout 1
    seen: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        recording(seen, fails=2).migrate(tmp_path)
    assert (seen, (tmp_path / FILE).read_text()) == ([1, 2], "2\n")
    seen.clear()
    recording(seen).migrate(tmp_path)
    assert (seen, (tmp_path / FILE).read_text()) == ([2], "3\n")
    seen.clear()
    recording(seen).migrate(tmp_path)
    assert seen == []


@pytest.mark.parametrize(
    ("text", "reason"), [("4\n", "STATE_NEWER"), ("three\n", "STATE_CORRUPT"), ("²\n", "STATE_CORRUPT")]
)
def test_what_is_newer_or_no_number_is_left_alone(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / FILE).write_text(text)
    seen: list[int] = []
    with pytest.raises(FsllmError) as refused:
        recording(seen).migrate(tmp_path)
    assert refused.value.reason == reason
    assert (seen, (tmp_path / FILE).read_text()) == ([], text)
