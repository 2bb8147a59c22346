"""Where a fold puts the version it makes: the blobs on disk, or nowhere, when only its digests are wanted."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from fsllm.v1.tensors_pb2 import Manifest
from fsllm_common.tensors.manifest import PayloadDigest
from fsllm_server.store.blobs import StoredVersion


class Writer(Protocol):
    """A payload in the making: ``write`` it in order, then ``commit``."""

    def write(self, data: memoryview) -> None:
        """Append bytes (a flat view)."""
        ...

    def commit(self) -> StoredVersion:
        """Return what was written, under its digest."""
        ...


class Sink(Protocol):
    """What ``store.blobs.Blobs`` is to a fold."""

    def create(self, manifest: Manifest) -> AbstractContextManager[Writer]:
        """Begin a payload of ``manifest``, whose digest is not set yet."""
        ...


class Digests:
    """A sink that keeps nothing but the digests."""

    def __init__(self, written: Callable[[int], None] = lambda _: None) -> None:
        """Args: written: Told how many bytes have been written, whenever some have."""
        self._written = written

    def create(self, manifest: Manifest) -> _Digest:
        """Begin a payload."""
        return _Digest(manifest, self._written)


class _Digest:
    def __init__(self, manifest: Manifest, written: Callable[[int], None]) -> None:
        self._manifest = manifest
        self._written = written
        self._digest = PayloadDigest(manifest)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def write(self, data: memoryview) -> None:
        self._digest.update(data)
        self._written(len(data))

    def commit(self) -> StoredVersion:
        made = Manifest()
        made.CopyFrom(self._manifest)
        made.digest = self._digest.digest()
        return StoredVersion(made, Path(os.devnull))
