"""Lets the tests here share helpers: in pytest's importlib mode a test's folder is not on the path by itself."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from worker_site import Site

    from fsllm_client.trainer.group import Group
    from fsllm_common.plan import Plan

sys.path.insert(0, str(Path(__file__).parent))

# Machines are shared and slow at times: no test may fail for the time it took.
settings.register_profile("fsllm", deadline=None)
settings.load_profile("fsllm")


@pytest.fixture
def site(tmp_path: Path, alone: "Group", tiny_model: Path, tiny_rows: Path) -> "Callable[..., Site]":
    """Return what makes a site whose worker is this process."""
    from worker_site import Site  # torch is not for all tests

    count = 0

    def make(plan: "Plan", model: Path = tiny_model, rows: Path = tiny_rows, **prepare: object) -> "Site":
        nonlocal count
        count += 1
        return Site(tmp_path / f"site-{count}", plan, alone, model, rows, **prepare)

    return make
