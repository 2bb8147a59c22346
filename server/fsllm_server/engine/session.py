"""One member's live Attach stream, as the engine sees it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from fsllm.v1 import federation_pb2
from fsllm_common.errors import FsllmError


class Session:
    """What the engine pushes to one attached member: an async iterator of responses, ended by ``close`` or ``end``.

    Each response is an Order or a Withdraw; Welcome is the service's.
    """

    def __init__(self, member: str, role: str, hello: federation_pb2.Hello, detach: Callable[[Session], None]) -> None:
        self.member = member
        self.role = role
        self.hello = hello
        self._detach = detach
        self._queue: asyncio.Queue[federation_pb2.AttachResponse | FsllmError | None] = asyncio.Queue()
        self._ended = False
        self._sent = set(hello.held_orders)

    def __aiter__(self) -> Session:
        return self

    async def __anext__(self) -> federation_pb2.AttachResponse:
        """Wait for the next order or withdrawal.

        Raises:
            FsllmError: ATTACHED_ELSEWHERE, MEMBER_REVOKED or SERVER_STOPPING: the engine ended the session.

        """
        item = await self._queue.get()
        if isinstance(item, federation_pb2.AttachResponse):
            return item
        self._queue.put_nowait(item)  # an ended session stays ended
        if item is None:
            raise StopAsyncIteration
        raise item

    def send(self, response: federation_pb2.AttachResponse) -> None:
        """Queue a response, unless the session has ended, or it is an order that the daemon has already."""
        if self._ended:
            return
        if response.WhichOneof("kind") == "order":
            if response.order.order_id in self._sent:
                return
            self._sent.add(response.order.order_id)
        else:
            self._sent.discard(response.withdraw.order_id)
        self._queue.put_nowait(response)

    def end(self, error: FsllmError | None) -> None:
        """End the session from the engine's side; the iterator raises ``error`` after what is queued."""
        if not self._ended:
            self._ended = True
            self._queue.put_nowait(error)

    def close(self) -> None:
        """Tell the engine that the stream is gone. Idempotent."""
        self.end(None)
        self._detach(self)
