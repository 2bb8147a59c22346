"""Fetching versions into a content-addressed cache: from any offset, verified chunk by chunk and as a whole.

A version may have several parts (fsllm.v1.Version); those that are here already are not fetched again.
"""

import asyncio
import os
import time
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import grpc
from google.protobuf.message import DecodeError

from fsllm.v1.federation_pb2 import DownloadRequest, Version
from fsllm.v1.tensors_pb2 import Manifest
from fsllm_client.link.channel import Link
from fsllm_client.link.retry import until_done
from fsllm_common.errors import Unavailable
from fsllm_common.files import disk_errors, write_all
from fsllm_common.rpc_errors import error_from
from fsllm_common.telemetry.metrics import ClientMetrics
from fsllm_common.tensors.chunks import Piece, parse_download
from fsllm_common.tensors.manifest import PayloadDigest, payload_digest, validate
from fsllm_common.tensors.parts import ManifestReader

KEPT: Final = 2
"""Parts of versions that stay in the cache besides those in use."""

Advance = Callable[[int, int], None]
"""(bytes done, bytes in all)."""


@dataclass(frozen=True, slots=True)
class CachedVersion:
    """A verified version, or a part of one, on this disk."""

    manifest: Manifest
    payload: Path


class VersionCache:
    """Versions by digest: DIGEST.manifest and DIGEST.payload, and what is on its way as DIGEST.RUN.part."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._verified: set[bytes] = set()
        self._in_use: frozenset[bytes] = frozenset()

    def use(self, digests: Iterable[bytes]) -> None:
        """Keep these from now on, whatever else comes, until others are named."""
        self._in_use = frozenset(digests)

    def find(self, digest: bytes) -> CachedVersion | None:
        """Return a version if it is here. Its digest is computed once in this process: no download was ever synced."""
        manifest_path, payload = self._paths(digest)
        try:
            manifest = Manifest.FromString(manifest_path.read_bytes())
            if digest not in self._verified and payload_digest(manifest, payload) != digest:
                self._drop(digest)
                return None
        except FileNotFoundError:
            return None
        except (DecodeError, ValueError, KeyError):  # a damaged manifest
            self._drop(digest)
            return None
        self._verified.add(digest)
        return CachedVersion(manifest, payload)

    def partial(self, run_id: str, digest: bytes) -> "Partial":
        """Return a version on its way, with what an earlier attempt left."""
        return Partial(self._root / f"{digest.hex()}.{run_id}.part", digest)

    def keep(self, partial: "Partial") -> CachedVersion:
        """Take a complete version in, and let the oldest others go.

        Raises:
            Unavailable: DIGEST_MISMATCH: it begins anew with the next attempt.

        """
        manifest = partial.finish()
        manifest_path, payload = self._paths(manifest.digest)
        manifest_path.write_bytes(manifest.SerializeToString())
        partial.path.replace(payload)
        self._verified.add(manifest.digest)
        others = [path for path in self._root.glob("*.payload") if bytes.fromhex(path.stem) not in self._in_use]
        newest = sorted(others, key=lambda path: path.stat().st_mtime, reverse=True)
        for old in newest[KEPT + (manifest.digest not in self._in_use) :]:
            self._drop(bytes.fromhex(old.stem))
        return CachedVersion(manifest, payload)

    def _paths(self, digest: bytes) -> tuple[Path, Path]:
        return self._root / f"{digest.hex()}.manifest", self._root / f"{digest.hex()}.payload"

    def _drop(self, digest: bytes) -> None:
        self._verified.discard(digest)
        for path in self._paths(digest):
            path.unlink(missing_ok=True)


class Partial:
    """A payload as far as it has come."""

    def __init__(self, path: Path, digest: bytes) -> None:
        self.path = path
        self._digest = digest
        self._manifest: Manifest | None = None
        self._hash: PayloadDigest | None = None
        self._file = -1
        self.offset = path.stat().st_size if path.exists() else 0

    @property
    def total(self) -> int:
        """The payload's size; 0 before its manifest is known."""
        return self._manifest.payload_bytes if self._manifest is not None else 0

    def begin(self, manifest: Manifest) -> None:
        """Take the manifest, which comes first in every attempt.

        Raises:
            UpdateRejected: MANIFEST_INVALID.
            Unavailable: DIGEST_MISMATCH: it describes something else.

        """
        validate(manifest)
        if manifest.digest != self._digest:
            raise Unavailable("DIGEST_MISMATCH", f"The server sent {manifest.digest.hex()} for {self._digest.hex()}")
        self._manifest = manifest
        if self._hash is None:
            with disk_errors(self.path.parent):
                self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            self._hash = PayloadDigest(manifest)
            if self.offset:
                self._hash.update_file(self.path)

    def write(self, offset: int, data: memoryview) -> None:
        """Append a chunk.

        Raises:
            Unavailable: CHUNK_CORRUPT: it does not start where the last one ended, or goes past the end. DISK_FULL.

        """
        if self._hash is None or offset != self.offset or offset + len(data) > self.total:
            raise Unavailable("CHUNK_CORRUPT", f"A chunk at offset {offset}; {self.offset} was expected")
        with disk_errors(self.path.parent):
            write_all(self._file, data, offset)
        self._hash.update(data)
        self.offset += len(data)

    def finish(self) -> Manifest:
        """Return the manifest, now that the payload is whole and verified.

        Raises:
            Unavailable: CHUNK_CORRUPT: bytes are missing. DIGEST_MISMATCH: everything is thrown away.

        """
        if self._manifest is None or self._hash is None or self.offset != self.total:
            raise Unavailable("CHUNK_CORRUPT", f"The stream ended at byte {self.offset} of {self.total}")
        if self._hash.digest() != self._digest:
            self.restart()
            raise Unavailable("DIGEST_MISMATCH", f"The payload received is not {self._digest.hex()}")
        self.close()
        return self._manifest

    def restart(self) -> None:
        """Throw away what was received."""
        self.close()
        self.path.unlink(missing_ok=True)
        self._manifest = self._hash = None
        self.offset = 0

    def close(self) -> None:
        """Let the file go; what it holds stays for the next attempt. May be called twice."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


class Downloader:
    """Fetches versions over the link."""

    def __init__(self, link: Link, cache: VersionCache, metrics: ClientMetrics) -> None:
        self._link = link
        self._cache = cache
        self._metrics = metrics

    async def fetch(
        self, run_id: str, version: Version, advance: Advance = lambda done, total: None
    ) -> list[CachedVersion]:
        """Return a version's parts, from the cache or from the server, however often the connection breaks.

        Raises:
            FsllmError: BLOB_UNKNOWN, and whatever else the server refuses with.

        """
        digests = [part.digest for part in version.parts] or [version.digest]
        self._cache.use(digests)
        return [await self._fetch(run_id, digest, advance) for digest in digests]

    async def _fetch(self, run_id: str, digest: bytes, advance: Advance) -> CachedVersion:
        found = await asyncio.to_thread(self._cache.find, digest)
        if found is not None:
            return found
        partial = self._cache.partial(run_id, digest)

        async def attempt() -> CachedVersion:
            started = time.monotonic()
            await self._receive(run_id, digest, partial, advance)
            version = self._cache.keep(partial)
            self._metrics.download_seconds.observe(time.monotonic() - started)
            return version

        with closing(partial):
            return await until_done("a download", attempt, lambda: partial.offset)

    async def _receive(self, run_id: str, digest: bytes, partial: Partial, advance: Advance) -> None:
        call = self._link.download(DownloadRequest(run_id=run_id, digest=digest, offset=partial.offset))
        reader = ManifestReader()
        try:
            async for wire in call:
                match parse_download(wire):
                    case Piece() as piece:
                        partial.write(piece.offset, piece.data)
                        self._metrics.received_bytes.inc(len(piece.data))
                    case message:
                        if (manifest := reader.take(message)) is not None:
                            partial.begin(manifest)
                advance(partial.offset, partial.total)
        except grpc.aio.AioRpcError as error:
            known = error_from(error)
            if known.reason == "OFFSET_OUT_OF_RANGE":
                partial.restart()
                raise Unavailable("DIGEST_MISMATCH", "The part on disk is longer than the version") from error
            raise known from error
        finally:
            call.cancel()
