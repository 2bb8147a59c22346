"""What a daemon sets for its own process, before it loads anything."""

import os

from fsllm_common.memory import limit_heaps


def prepare() -> None:
    """Make files private, native libraries quiet, linear algebra single-threaded, and the heaps few.

    Settings of the environment outrank all but the first.
    """
    os.umask(0o077)  # whatever the daemon and its children write is their own
    # The core's own lines (one a failed handshake) are no JSON and name no cause that the peer is not told.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    # numpy's OpenBLAS takes every core for a dot product of 1 MiB, and its threads spin between two of them: a round
    # cost the server twice the processor time.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    limit_heaps()
