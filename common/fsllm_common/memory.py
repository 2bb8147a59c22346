"""Keeping a daemon small: few heaps, and what only start-up needed given back."""

import os
import re
from pathlib import Path
from typing import Final

_HEAD: Final = re.compile(r"([0-9a-f]+)-([0-9a-f]+) (\S+) \S+ \S+ (\d+) ")
_MADV_DONTNEED: Final = 4  # of <sys/mman.h> on Linux
_M_ARENA_MAX: Final = -8  # of <malloc.h> in glibc
_ARENAS: Final = 2


def limit_heaps() -> None:
    """Let all threads share two heaps; glibc's default is eight a core, each of which keeps what it once needed.

    Does nothing with another C library, or where MALLOC_ARENA_MAX has decided.
    """
    if "MALLOC_ARENA_MAX" in os.environ:
        return
    import ctypes  # here: half a MiB, for start-up only

    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_ARENA_MAX, _ARENAS)


def give_back_start_up() -> None:
    """Let go of the pages of machine code that importing and initialising the libraries has touched: about 24 MiB.

    They are unchanged copies of files in the page cache: what is still used comes back by itself at its next use, at
    the cost of a minor fault. A mapping that holds any page of its own (changed by a debugger, say) is left alone. Does
    nothing where there is no /proc.
    """
    smaps = Path("/proc/self/smaps")
    if not smaps.exists():
        return
    import ctypes  # here: half a MiB, for start-up only

    madvise = ctypes.CDLL(None).madvise
    for begin, end in _untouched_code(smaps.read_text()):
        madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), _MADV_DONTNEED)


def _untouched_code(smaps: str) -> list[tuple[int, int]]:
    """Return begin and end of each executable mapping of a file that is as the file is."""
    found: list[tuple[int, int]] = []
    mapping: tuple[int, int] | None = None
    for line in smaps.splitlines():
        if head := _HEAD.match(line):
            begin, end, permissions, inode = head.groups()
            mapping = (int(begin, 16), int(end, 16)) if permissions == "r-xp" and inode != "0" else None
        elif mapping and line.split()[:2] == ["Anonymous:", "0"]:
            found.append(mapping)
    return found
