"""Upload slots: first come, first served, and everybody is told the place."""

import asyncio
from contextlib import ExitStack

import pytest

from fsllm_common.telemetry.metrics import ServerMetrics
from fsllm_server.service import admission
from fsllm_server.service.admission import Admission, Ticket


def gauges(metrics: ServerMetrics) -> tuple[float | None, float | None]:
    value = metrics.registry.get_sample_value
    return value("fsllm_server_uploads_active"), value("fsllm_server_uploads_queued")


async def wait(ticket: Ticket, told: list[int]) -> None:
    async for place in ticket.places():
        told.append(place)


async def test_slots_go_in_order_and_places_are_told_as_they_change() -> None:
    metrics = ServerMetrics()
    queue = Admission(2, metrics)
    tickets = [queue.join() for _ in range(5)]
    told: list[list[int]] = [[] for _ in tickets]
    async with asyncio.TaskGroup() as group:
        for ticket, places in zip(tickets, told, strict=True):
            group.create_task(wait(ticket, places))
        await asyncio.sleep(0)
        assert told == [[], [], [1], [2], [3]]
        assert gauges(metrics) == (2, 3)
        with tickets[3]:  # gives up in the queue: those behind move up, those before do not
            pass
        await asyncio.sleep(0)
        assert [told[2], told[4]] == [[1, 1], [3, 2]]
        tickets[3].admitted = True  # its waiter goes home
        tickets[3].changed.set()
        with tickets[0]:
            pass
        await asyncio.sleep(0)
        assert tickets[2].admitted
        assert not tickets[4].admitted
        assert told[4][-1] == 1
        with tickets[1]:
            pass
    assert tickets[4].admitted
    with ExitStack() as stack:
        stack.enter_context(tickets[2])
        stack.enter_context(tickets[4])
    assert gauges(metrics) == (0, 0)


async def test_a_failed_upload_gives_its_slot_back() -> None:
    queue = Admission(1, ServerMetrics())
    with pytest.raises(RuntimeError, match="broken"), queue.join():
        raise RuntimeError("broken")
    with queue.join() as ticket:
        assert ticket.admitted


async def test_a_long_wait_has_signs_of_life(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission, "SIGN_OF_LIFE", 0.001)
    queue = Admission(1, ServerMetrics())
    first, second = queue.join(), queue.join()
    places = second.places()
    assert [await anext(places) for _ in range(3)] == [1, 1, 1]
    with first:
        pass
    with second:
        assert [place async for place in places] == []
