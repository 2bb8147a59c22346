"""What a round starts from: the state of the round before it, also after a crash, a refusal, a restored server."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fsllm_client.trainer.kept import PRIVATE, Kept, Private
from fsllm_common import failpoints
from fsllm_common.errors import Unavailable


@pytest.fixture
def kept(tmp_path: Path) -> Kept:
    return Kept(tmp_path, PRIVATE)


@pytest.fixture
def _deaf() -> Iterator[None]:
    yield
    failpoints.listen(None)


def save(kept: Kept, round_number: int, value: int, *, acknowledged: bool = True) -> None:
    tensors = Private({"a": torch.tensor([value])}, {"b": torch.tensor([-value])}).tensors()
    kept.save(round_number, tensors, acknowledged=acknowledged)


def start(kept: Kept, round_number: int) -> int | None:
    """Return the number that a round starts from."""
    private = Private.of(kept.before(round_number))
    if not private.own:
        return None
    assert private.rule["b"].tolist() == (-private.own["a"]).tolist()
    return int(private.own["a"])


def test_the_last_two_rounds_are_kept_and_a_round_starts_from_the_one_before_it(kept: Kept, tmp_path: Path) -> None:
    assert Kept(tmp_path / "absent", PRIVATE).before(1) is None
    kept.save(1, {})  # nothing to keep
    assert list(tmp_path.iterdir()) == []
    for number in (1, 2, 5):
        assert start(kept, number) == {1: None, 2: 1, 5: 2}[number]
        save(kept, number, number)
        assert start(kept, number) == {1: None, 2: 1, 5: 2}[number], "when it is trained again"
    assert start(kept, 9) == 5
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"private-0000000{n}.safetensors" for n in (2, 5)]
    Kept(tmp_path, "optimizer").save(6, {"step": torch.tensor(3)})
    assert start(kept, 9) == 5
    assert Private.of(None) == Private({}, {})


def test_a_site_goes_on_from_what_it_has_when_the_server_goes_back_and_the_abandoned_future_is_gone(kept: Kept) -> None:
    for number in range(1, 11):
        save(kept, number, number)
    for _ in range(2):  # the second time after a crash between training and delivery
        assert start(kept, 8) == 10
        save(kept, 8, 108)
    assert [start(kept, number) for number in (9, 10, 11, 20)] == [108] * 4, "also where it sits some rounds out"
    save(kept, 9, 109)
    assert [start(kept, number) for number in (9, 10, 11)] == [108, 109, 109]
    save(kept, 10, 110)
    assert start(kept, 11) == 110


def test_a_state_that_is_older_than_the_back_up_is_the_one_to_go_on_from(kept: Kept) -> None:
    save(kept, 3, 3)
    save(kept, 10, 10)
    assert start(kept, 8) == 3
    save(kept, 8, 108)
    assert [start(kept, number) for number in (8, 9, 11)] == [3, 108, 108]


def test_the_first_round_has_nothing_to_start_from_when_it_is_trained_again(kept: Kept) -> None:
    save(kept, 5, 5)
    assert start(kept, 5) is None


@pytest.mark.usefixtures("_deaf")
@pytest.mark.parametrize("acknowledged", [True, False])
@pytest.mark.parametrize(("rounds", "again"), [((1, 2), 3), ((9, 10), 8)])
def test_a_disk_that_fails_at_any_instant_leaves_what_the_round_starts_from(
    rounds: tuple[int, int], again: int, acknowledged: bool, tmp_path: Path
) -> None:
    points = 0
    for struck in range(1, 40):
        (folder := tmp_path / str(struck)).mkdir()
        kept = Kept(folder, PRIVATE)
        for number in rounds:
            save(kept, number, number)
        reached = 0

        def strike(_: str, at: int = struck) -> None:
            nonlocal reached
            reached += 1
            if reached == at:
                raise OSError(5, "Input/output error")

        failpoints.listen(strike)
        try:
            save(kept, again, 100, acknowledged=acknowledged)
        except Unavailable:
            points += 1
        else:
            break
        finally:
            failpoints.listen(None)
        assert start(kept, again) == rounds[-1], struck
        save(kept, again, 100, acknowledged=acknowledged)
        kept.acknowledge(again)
        assert [start(kept, number) for number in (again, again + 1, 11)] == [rounds[-1], 100, 100]
    assert points == (5 if again == 3 else 10)


def test_a_state_that_waits_counts_with_the_receipt_and_not_before(kept: Kept, tmp_path: Path) -> None:
    save(kept, 1, 1, acknowledged=False)
    assert kept.awaits(1)
    assert start(kept, 2) is None
    kept.acknowledge(1)
    assert not kept.awaits(1)
    assert start(kept, 2) == 1
    for number in (2, 3):  # refused, or too late
        save(kept, number, number, acknowledged=False)
        assert start(kept, number + 1) == 1
    kept.acknowledge(2)  # of which nothing is left
    assert start(kept, 4) == 1
    kept.acknowledge(3)
    assert start(kept, 4) == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"private-0000000{n}.safetensors" for n in (1, 3)]


def test_a_state_of_the_abandoned_future_does_not_count_in_place_of_one_that_waits(kept: Kept) -> None:
    for number in (9, 10):
        save(kept, number, number)
    save(kept, 10, 110, acknowledged=False)  # again: the server went back to 9
    assert start(kept, 11) == 9
    kept.acknowledge(10)
    assert start(kept, 11) == 110
