"""What becomes of results: each is sent until there is a receipt, or until nobody can want it any more.

A receipt is told to the private state that waits for it (``LocalRule.awaits_receipt``) before the parcel leaves the
outbox: as long as that lies there, the server can be asked again.
"""

import asyncio
from collections.abc import Mapping
from functools import partial
from typing import Final

from fsllm_client.link.retry import until_done
from fsllm_client.link.upload import Advance, Uploader
from fsllm_client.site.outbox import Outbox, Parcel
from fsllm_client.site.state import StateFolder
from fsllm_client.trainer.kept import PRIVATE, Kept
from fsllm_common.errors import FsllmError
from fsllm_common.failpoints import reach
from fsllm_common.telemetry.logs import get_logger

log = get_logger()

_USELESS: Final = frozenset(
    {"MANIFEST_INVALID", "NOT_FINITE", "NORM_TOO_LARGE", "UPDATE_CONFLICT", "STATE_CORRUPT", "MODEL_DIGEST_MISMATCH"}
)
"""Refusals after which a result is of no use to anyone and leaves the outbox."""


class Deliveries:
    """The way of a site's results from the outbox to the server."""

    def __init__(self, outbox: Outbox, uploader: Uploader, state: StateFolder) -> None:
        self._outbox = outbox
        self._uploader = uploader
        self._state = state

    async def deliver(self, parcel: Parcel, advance: Advance) -> None:
        """Send a parcel; it leaves the outbox with the receipt, or when nobody can want it any more.

        Raises:
            FsllmError: The server's refusal.
            Unavailable: DISK_FAILED: it stays in the outbox.

        """
        try:
            receipt = await self._uploader.deliver(parcel, advance)
        except FsllmError as error:
            if error.reason in _USELESS:
                self._outbox.remove(parcel)
            raise
        reach("receipt.received")
        self._acknowledged(parcel)
        reach("parcel.removed")
        log.info(
            "delivered", bytes=receipt.payload_bytes, digest=receipt.digest.hex()[:12], duplicate=receipt.duplicate
        )

    async def tidy(self, turns: Mapping[str, asyncio.Lock]) -> None:
        """Let go of results that the server has, after a crash, or will not ask for any more: their round is over.

        Args:
            turns: By run; a parcel is looked at when no order of its run is.

        Raises:
            FsllmError: The server can not be asked now. STATE_CORRUPT.

        """

        async def look_at(parcel: Parcel) -> None:
            async with turns[parcel.begin.run_id]:
                if parcel.folder.exists():
                    await self._settle(parcel)

        await asyncio.gather(*(look_at(parcel) for parcel in self._outbox.all()))

    async def settle_before(self, run_id: str, round_: int) -> None:
        """Let go of a run's results of earlier rounds, which nobody will ask for any more.

        A receipt that a crash has kept from this site decides what the round starts from: the server is asked for it,
        until it answers.

        Raises:
            FsllmError: STATE_CORRUPT.

        """
        for parcel in self._outbox.all(run_id):
            if parcel.begin.round < round_ and self._kept(parcel).awaits(parcel.begin.round):
                await until_done("a question about a result", partial(self._settle, parcel), lambda: 0)
        self._outbox.remove_before(run_id, round_)

    async def _settle(self, parcel: Parcel) -> None:
        status = await self._uploader.status(parcel)
        if status.HasField("receipt"):
            self._acknowledged(parcel)
        elif status.round_over:
            self._outbox.remove(parcel)
        else:
            return
        log.info("nobody waits for this result any more", digest=parcel.digest.hex()[:12])

    def _acknowledged(self, parcel: Parcel) -> None:
        self._kept(parcel).acknowledge(parcel.begin.round)
        self._outbox.remove(parcel)

    def _kept(self, parcel: Parcel) -> Kept:
        return Kept(self._state.private(parcel.begin.run_id), PRIVATE)
