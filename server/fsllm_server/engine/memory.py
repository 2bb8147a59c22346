"""The few numbers that a method keeps from round to round, as one more blob of the server's state."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from fsllm.v1.tensors_pb2 import ELEMENT_TYPE_FLOAT32, TENSOR_ROLE_SCALAR
from fsllm_common.algorithms import Algorithm
from fsllm_common.tensors.manifest import describe

if TYPE_CHECKING:
    from fsllm_server.engine.state import Version
    from fsllm_server.reduce.sink import Sink
    from fsllm_server.store.blobs import Blobs

# numpy is imported in the functions: it would be a third of an idle server's memory.

NAME: Final = "memory"
"""Of the blob, among the server's state."""


def recall(algorithm: Algorithm, base: Version | None, blobs: Blobs) -> None:
    """Give the algorithm the numbers that the base version's round has left, before it weighs the next one's updates.

    Raises:
        FsllmError: STATE_CORRUPT, BLOB_UNKNOWN.

    """
    digest = dict(base.state if base is not None else ()).get(NAME)
    if digest is None:
        return
    import numpy as np

    algorithm.memory = np.fromfile(blobs.get(bytes.fromhex(digest)).payload, "<f4").tolist()


def keep(algorithm: Algorithm, sink: Sink) -> bytes:
    """Store the numbers that the algorithm has now, and return their blob's digest.

    Raises:
        FsllmError: DISK_FULL.

    """
    import numpy as np

    numbers = np.array(algorithm.memory, "<f4")
    with sink.create(describe([(NAME, numbers.shape, TENSOR_ROLE_SCALAR)], ELEMENT_TYPE_FLOAT32)) as writer:
        writer.write(numbers.view(np.uint8).data)
        return writer.commit().digest
