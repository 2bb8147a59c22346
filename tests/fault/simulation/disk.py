"""What a crash leaves of a folder: everything after kill -9, what was synced and by chance some of the rest after a
power loss.

Files are real, on a tmpfs. While the simulation runs, ``os.fsync`` and ``os.fdatasync`` note what a file or a folder
held when it was synced. The next incarnation of a process gets a new folder, made of the old one: the killed one may
unwind as it likes, nobody sees it.

The model of a power loss is the weakest that POSIX allows, but for renames: a file holds what was synced, what was
written last, or a torn mixture; each name of a folder that was made, replaced or removed since the folder was synced is
there or not; a renamed file has its old name or its new one.
"""

import os
import random
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple


class Entry(NamedTuple):
    """A name in a folder."""

    inode: int
    is_folder: bool


@dataclass
class Synced:
    """What is on the platters."""

    contents: dict[int, bytes] = field(default_factory=dict)
    """By inode: a file's bytes when it was synced last."""
    entries: dict[int, dict[str, Entry]] = field(default_factory=dict)
    """By inode: a folder's names when it was synced last."""

    def sync(self, descriptor: int) -> None:
        """Take note of a file or folder as it is now."""
        status = os.fstat(descriptor)
        if stat.S_ISDIR(status.st_mode):
            self.entries[status.st_ino] = _listing(descriptor)
        else:
            # Another descriptor: this one may be open for writing only.
            reading = os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY)
            try:
                self.contents[status.st_ino] = os.pread(reading, status.st_size, 0)
            finally:
                os.close(reading)


def after_kill(old: Path, new: Path, synced: Synced) -> None:
    """Copy a folder: the page cache survives the process, but what was not synced is still in danger."""
    moved: dict[int, int] = {}
    _copy(old, new, synced, moved)
    for old_inode, new_inode in list(moved.items()):
        if (entries := synced.entries.get(old_inode)) is not None:
            synced.entries[new_inode] = {
                name: entry._replace(inode=moved.get(entry.inode, entry.inode)) for name, entry in entries.items()
            }


def _copy(old: Path, new: Path, synced: Synced, moved: dict[int, int]) -> None:
    new.mkdir(mode=0o700)
    moved[old.stat().st_ino] = new.stat().st_ino
    for name, entry in sorted(_listing(old).items()):
        if entry.is_folder:
            _copy(old / name, new / name, synced, moved)
        elif (old / name).is_file():
            (new / name).write_bytes((old / name).read_bytes())
            inode = (new / name).stat().st_ino
            moved[entry.inode] = inode
            if (content := synced.contents.get(entry.inode)) is not None:
                synced.contents[inode] = content


def after_power_loss(old: Path, new: Path, synced: Synced, chance: random.Random) -> None:
    """Make what a power loss leaves of ``old``; all of that is on the platters."""
    paths = {entry.inode: path for path, entry in _walk(old)}
    _revive(Entry(old.stat().st_ino, is_folder=True), old, new, paths, synced, chance)


def _revive(
    entry: Entry, old: Path | None, new: Path, paths: dict[int, Path], synced: Synced, chance: random.Random
) -> None:
    if not entry.is_folder:
        content = _survivor(entry.inode, old, synced, chance)
        new.write_bytes(content)
        synced.contents[new.stat().st_ino] = content
        return
    new.mkdir(mode=0o700)
    durable = synced.entries.get(entry.inode, {})
    current = _listing(old) if old is not None else {}
    chosen: dict[str, Entry] = {}
    for name in sorted({*durable, *current}):
        before, after = durable.get(name), current.get(name)
        kept = after if before == after or chance.random() < 0.5 else before
        if kept is not None:
            chosen[name] = kept
    # A rename is one act: what was there under a durable name and has another now can not lose both.
    there = {kept.inode for kept in chosen.values()}
    safe = {before.inode for before in durable.values()}
    for name, after in sorted(current.items()):
        if after.inode in safe and after.inode not in there:
            chosen[name] = after
    for name, kept in sorted(chosen.items()):
        _revive(kept, paths.get(kept.inode), new / name, paths, synced, chance)
    synced.entries[new.stat().st_ino] = _listing(new)


def _survivor(inode: int, path: Path | None, synced: Synced, chance: random.Random) -> bytes:
    durable = synced.contents.get(inode)
    if path is None:
        return durable if durable is not None else b""
    current = path.read_bytes()
    if durable == current:
        return current
    kept = durable if durable is not None else b""
    match chance.randrange(4):
        case 0:
            return current
        case 1:
            return kept
        case 2:  # the length was written, not all of the data
            at = chance.randint(0, len(current))
            return current[:at] + kept[at : len(current)].ljust(len(current) - at, b"\0")
        case _:
            at = chance.randint(0, len(current))
            return current[:at] + kept[at:]


def _listing(folder: Path | int) -> dict[str, Entry]:
    with os.scandir(folder) as found:
        return {item.name: Entry(item.inode(), item.is_dir(follow_symlinks=False)) for item in found}


def _walk(folder: Path) -> Iterator[tuple[Path, Entry]]:
    for name, entry in _listing(folder).items():
        yield folder / name, entry
        if entry.is_folder:
            yield from _walk(folder / name)
