"""Measured tables in docs/performance.md, between markers, with the machine and the versions they were measured on."""

import os
import platform
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from fsllm_common import __version__
from fsllm_common.errors import InputError
from fsllm_common.files import write_atomic


def machine() -> str:
    """Return what the figures depend on, in a line."""
    model = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    cores = len(os.sched_getaffinity(0))
    return (
        f"{model[1] if model else platform.machine()}, {cores} cores, {memory:.0f} GiB of memory, "
        f"{platform.system()} {platform.release()}; Python {platform.python_version()}, "
        f"grpcio {version('grpcio')}, numpy {version('numpy')}, fsllm {__version__}"
    )


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    lines = [columns, ["---:"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write_section(page: Path, name: str, commands: Sequence[str], text: str) -> None:
    """Put ``text`` between the page's markers ``<!-- NAME:begin -->`` and ``<!-- NAME:end -->``.

    Raises:
        InputError: SETTING_INVALID: the page has no such markers.

    """
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    before, _, rest = page.read_text().partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise InputError("SETTING_INVALID", f"--write: {page} must hold {begin} and {end}, in this order")
    typed = ", ".join(f"`{command}`" for command in commands)
    about = f"{typed}, {datetime.now(UTC):%Y-%m-%d}, on {machine()}."
    write_atomic(page, f"{before}{begin}\n{about}\n\n{text}\n{end}{after}".encode())
