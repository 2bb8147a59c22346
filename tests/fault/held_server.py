"""``fsllm-server`` whose reductions wait for the pipe ``$FSLLM_TEST_HOLD``: a test looks at a run in the midst."""

import os
from pathlib import Path

from fsllm_common import failpoints
from fsllm_server.cli import main

PIPE = Path(os.environ["FSLLM_TEST_HOLD"])


def hold(name: str) -> None:
    if name == "blob.sync" and PIPE.exists():
        # Returns from open when the test has opened its end, and from read when the test has closed it.
        PIPE.read_bytes()


if __name__ == "__main__":
    failpoints.listen(hold)
    main()
