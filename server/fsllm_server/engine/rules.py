"""The versions of what the core decides.

A run's state is what its log gives when it is decided upon again. So a log goes on under the decisions that it was
begun with, whatever a later fsllm decides: a run keeps the version that it was submitted under; a change of what is
decided makes the next version, and asks for it (``run.rules >= ...``). ``tests/contract/test_old_logs.py`` holds the
core against logs that were recorded under each.
"""

from typing import Final

FIRST: Final = 1
"""Of logs that did not say."""

ABSENT_ARE_AWAITED: Final = 2
"""Before a version is measured, and a cohort is drawn, those who have just gone have a moment to come back."""

LATEST: Final = 2
"""What a run that is submitted now goes by."""
