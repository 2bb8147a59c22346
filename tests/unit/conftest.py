"""Lets the tests here share helpers: in pytest's importlib mode a test's folder is not on the path by itself."""

import sys
from pathlib import Path

from hypothesis import settings

sys.path.insert(0, str(Path(__file__).parent))

# Machines are shared and slow at times: no test may fail for the time it took.
settings.register_profile("fsllm", deadline=None)
settings.load_profile("fsllm")
