"""One transfer, tried until it is done or refused."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

from fsllm_client.link.backoff import Backoff
from fsllm_common.errors import FsllmError
from fsllm_common.telemetry.logs import get_logger

log = get_logger()

RETRIED: Final = frozenset(
    {
        "BUSY",
        "CHUNK_CORRUPT",
        "DIGEST_MISMATCH",
        "DISK_FULL",
        "OFFSET_OUT_OF_RANGE",
        "SERVER_STOPPING",
        "SERVER_UNREACHABLE",
    }
)
"""Reasons after which the same call may succeed, as after any for which the server states a delay."""

Result = TypeVar("Result")


async def until_done(
    what: str, attempt: Callable[[], Awaitable[Result]], position: Callable[[], int], backoff: Backoff | None = None
) -> Result:
    """Call ``attempt`` until it returns.

    Args:
        what: For the log.
        attempt: One try, which goes on where the last one ended.
        position: How far the transfer is, in bytes; after an attempt that advanced, waits begin at the shortest again.
        backoff: The waits.

    Raises:
        FsllmError: A reason that is not in ``RETRIED`` and comes without a delay.

    """
    backoff = backoff if backoff is not None else Backoff()
    while True:
        before = position()
        try:
            return await attempt()
        except FsllmError as error:
            if error.reason not in RETRIED and error.retry_after is None:
                raise
            if position() != before:
                backoff.reset()
            seconds = backoff.wait(error.retry_after)
            log.warning(
                f"{what} was interrupted; trying again",
                reason=error.reason,
                error=error.message,
                at_byte=position(),
                wait_seconds=round(seconds, 2),
            )
        await asyncio.sleep(seconds)
