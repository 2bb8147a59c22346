"""Versions on disk: content-addressed, immutable, complete or not there.

``blobs/<digest>/`` holds ``payload`` and ``manifest`` (a serialised fsllm.v1.Manifest). Both are written and synced in
``blobs/.new-<random>/``, which is then renamed: the name appears only when the whole is durable. The manifest kept here
has no adapter_config: the digest does not cover it, and two runs may share a payload but not a configuration.
"""

from __future__ import annotations

import os
import secrets
import shutil
from dataclasses import dataclass
from pathlib import Path

from fsllm.v1.tensors_pb2 import Manifest
from fsllm_common.errors import FsllmError
from fsllm_common.failpoints import reach
from fsllm_common.files import disk_errors, make_folder, sync_folder, write_all, write_behind
from fsllm_common.tensors.manifest import PayloadDigest
from fsllm_server.store.files import demand_space

_NEW = ".new-"


@dataclass(frozen=True, slots=True)
class StoredVersion:
    """A tensor set on disk, to be served or folded. The files never change."""

    manifest: Manifest
    payload: Path

    @property
    def digest(self) -> bytes:
        """The manifest's digest, 32 bytes."""
        return self.manifest.digest


class Blobs:
    """All tensor sets that the server keeps."""

    def __init__(self, folder: Path) -> None:
        """Open the folder, and sweep away what a crash left half-written."""
        self.folder = folder
        make_folder(folder)
        for left in folder.glob(f"{_NEW}*"):
            shutil.rmtree(left)

    def get(self, digest: bytes) -> StoredVersion:
        """Return a blob.

        Raises:
            FsllmError: BLOB_UNKNOWN.

        """
        place = self.folder / digest.hex()
        try:
            manifest = Manifest.FromString((place / "manifest").read_bytes())
        except FileNotFoundError:
            raise FsllmError("BLOB_UNKNOWN", f"No tensors with digest {digest.hex()[:12]} are kept here") from None
        return StoredVersion(manifest, place / "payload")

    def create(self, manifest: Manifest) -> BlobWriter:
        """Begin a new blob of ``manifest``, whose digest need not be set yet.

        Raises:
            FsllmError: DISK_FULL.

        """
        return BlobWriter(self.folder, manifest)


class BlobWriter:
    """A blob in the making: ``write`` its payload in order, then ``commit``. Leaving the context drops what is left."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self._folder = folder
        self._manifest = Manifest()
        self._manifest.CopyFrom(manifest)
        self._manifest.ClearField("adapter_config")
        self._digest = PayloadDigest(self._manifest)
        self._written = 0
        self._file = -1
        self._new = folder / f"{_NEW}{secrets.token_hex(8)}"
        with disk_errors(folder):
            demand_space(folder, manifest.payload_bytes)
            self._new.mkdir(mode=0o700)
            self._file = os.open(self._new / "payload", os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)

    def __enter__(self) -> BlobWriter:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
        shutil.rmtree(self._new, ignore_errors=True)

    def write(self, data: memoryview) -> None:
        """Append bytes of the payload (a flat view of bytes).

        Raises:
            FsllmError: DISK_FULL.

        """
        with disk_errors(self._folder):
            write_all(self._file, data, self._written)
            self._written += len(data)
            write_behind(self._file, self._written)
        self._digest.update(data)

    def commit(self) -> StoredVersion:
        """Make the blob durable and visible under its digest, and return it. The same content again is no error.

        Raises:
            FsllmError: DISK_FULL.

        """
        if self._written != self._manifest.payload_bytes:
            raise ValueError(f"{self._written} bytes written of {self._manifest.payload_bytes}")
        self._manifest.digest = self._digest.digest()
        place = self._folder / self._manifest.digest.hex()
        with disk_errors(self._folder):
            reach("blob.sync")
            os.fsync(self._file)
            os.close(self._file)
            self._file = -1
            with (self._new / "manifest").open("wb") as file:
                file.write(self._manifest.SerializeToString(deterministic=True))
                file.flush()
                reach("blob.sync")
                os.fsync(file.fileno())
            sync_folder(self._new)
            reach("blob.synced")
            ours = not place.exists()
            if ours:
                reach("blob.rename")
                self._new.rename(place)
            try:
                # For a name that was there already too: a crash may have come between its renaming and its sync.
                sync_folder(self._folder)
            except OSError:
                if ours:
                    place.rename(self._new)  # so that the next attempt renames, and syncs, anew
                raise
            reach("blob.renamed")
        return StoredVersion(self._manifest, place / "payload")
