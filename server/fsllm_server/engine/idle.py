"""The idle watch: a member is idle when no step and no byte of its order has advanced for the plan's idle time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final

from fsllm.v1 import federation_pb2
from fsllm_server.engine.state import Order

_LATE: Final = 1.0
"""Seconds by which no alarm is late but when the whole process was."""


@dataclass(slots=True)
class _Watched:
    order: Order
    advanced: float
    """When it last did, by the loop's clock."""
    seen: tuple[str, int] = ("", 0)
    """Activity and how much of it was done, as last reported."""
    alarm: asyncio.TimerHandle | None = None


class IdleWatch:
    """One alarm for each open order of a run. An advance notes the time; the alarm looks at it when it goes off."""

    def __init__(self, seconds: float, idle: Callable[[Order], None]) -> None:
        self._seconds = seconds
        self._idle = idle
        self._watched: dict[str, _Watched] = {}

    def follow(self, orders: Iterable[Order]) -> None:
        """Watch exactly these orders: the clocks of new ones start now."""
        current = {order.id: order for order in orders}
        for order_id in self._watched.keys() - current.keys():
            self._stop(self._watched.pop(order_id))
        # In their order, so that alarms of one instant go off in the same order every time.
        for order_id, order in current.items():
            if order_id not in self._watched:
                watched = self._watched[order_id] = _Watched(order, self._now())
                self._arm(watched)

    def progress(self, progress: federation_pb2.Progress) -> None:
        """Take a report: it counts when something has advanced, or when it is the server that lets the site wait."""
        watched = self._watched.get(progress.order_id)
        if watched is not None:
            seen = (progress.activity, progress.done)
            if seen != watched.seen or progress.activity == "queued":
                watched.seen = seen
                self._advance(watched)

    def touch(self, member: str) -> None:
        """Bytes of one of the member's orders have advanced."""
        for watched in self._watched.values():
            if watched.order.member == member:
                self._advance(watched)

    def stop(self) -> None:
        """Watch nothing any more."""
        self.follow(())

    def _advance(self, watched: _Watched) -> None:
        watched.advanced = self._now()
        if watched.alarm is None:
            self._arm(watched)

    def _arm(self, watched: _Watched) -> None:
        loop = asyncio.get_running_loop()
        watched.alarm = loop.call_at(watched.advanced + self._seconds, self._look, watched)

    def _look(self, watched: _Watched) -> None:
        late = self._now() - watched.alarm.when() if watched.alarm is not None else 0.0
        watched.alarm = None
        if late > _LATE:
            watched.advanced = self._now()  # it was this process that stood still: what came meanwhile is unread
        if self._now() < watched.advanced + self._seconds:
            self._arm(watched)
        else:
            # Once; an order that stays open all the same is watched again from its next advance on.
            self._idle(watched.order)

    @staticmethod
    def _stop(watched: _Watched) -> None:
        if watched.alarm is not None:
            watched.alarm.cancel()

    @staticmethod
    def _now() -> float:
        return asyncio.get_running_loop().time()
