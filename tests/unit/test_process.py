"""What a daemon sets for its own process."""

import os
import subprocess
import sys

_MAIN = """
import os
from fsllm_common.process import prepare
prepare()
import numpy as np
np.dot(np.ones(1 << 20), np.ones(1 << 20))
print(len(os.listdir("/proc/self/task")), oct(os.umask(0)), os.environ["GRPC_VERBOSITY"])
"""


def _run(**settings: str) -> list[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "OPENBLAS_", "GRPC_"))}
    done = subprocess.run(
        [sys.executable, "-c", _MAIN], env=kept | settings, check=True, capture_output=True, text=True
    )
    return done.stdout.split()


def test_linear_algebra_has_one_thread_files_are_private_and_grpc_is_quiet() -> None:
    assert _run() == ["1", "0o77", "NONE"]


def test_the_environment_outranks_it() -> None:
    assert _run(OPENBLAS_NUM_THREADS="2", GRPC_VERBOSITY="ERROR") == ["2", "0o77", "ERROR"]
