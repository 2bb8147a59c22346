"""How many connections this process can hold: each is an open file."""

import resource
from typing import Final

from fsllm_common.telemetry.logs import get_logger

OWN: Final = 512
"""Files that the server needs besides: the database, uploads, versions, newcomers."""

log = get_logger()


def connections_possible(wanted: int) -> int:
    """Raise the limit of open files as far as it takes and may be; return how many connections the port may hold."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = wanted + OWN
    if soft < needed:
        soft = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft < needed:
        wanted = max(1, soft - OWN)
        log.warning("fewer connections than set: the limit of open files is low", open_files=soft, connections=wanted)
    return wanted
