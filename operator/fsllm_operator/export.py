"""Exporting a committed version as a folder that PEFT loads.

The folder is complete when adapter_config.json lies in it: that file is written last, and removed first when an export
is replaced. What has arrived of a download waits in ``.partial`` inside the folder, so that the same command goes on
where the last one stood.
"""

import json
from collections.abc import Generator, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

import grpc

from fsllm.v1.control_pb2 import ExportRunRequest, GetServerRequest, RoundManifest, Run
from fsllm.v1.tensors_pb2 import Manifest
from fsllm_common.errors import FsllmError, SettingsInvalid, Unavailable
from fsllm_common.files import disk_errors, write_atomic
from fsllm_common.round_manifest import Link, check_chain, decode
from fsllm_common.tensors.chunks import Piece, parse_download
from fsllm_common.tensors.manifest import payload_digest, split_part_name, validate, version_digest
from fsllm_common.tensors.parts import ManifestReader
from fsllm_operator.as_json import manifest_object
from fsllm_operator.card import card
from fsllm_operator.connection import Connection, explain, wait

WEIGHTS: Final = "adapter_model.safetensors"
CONFIG: Final = "adapter_config.json"
CARD: Final = "README.md"
MANIFESTS: Final = "manifests.json"
_PARTIAL: Final = ".partial"
_ATTEMPTS: Final = 5
"""Breaks of the stream without a byte of progress between them, before we give up."""


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written."""

    run_id: str
    name: str
    version: int
    folder: str
    tensors: int
    parameters: int
    digest: str

    def as_object(self) -> dict[str, Any]:
        """Return it for ``--json``."""
        return asdict(self)


def export_run(connection: Connection, run: Run, folder: Path, version: int | None = None, *, force: bool) -> Exported:
    """Write a committed version of a run into ``folder``: float32 safetensors, PEFT configuration, card, and manifests.

    Raises:
        FsllmError: SETTING_INVALID: an adapter is there and ``force`` is not set. VERSION_UNKNOWN.
            ROUND_BROKEN: the version is not what the rounds' manifests say. DIGEST_MISMATCH: twice. DISK_FULL.
            SERVER_UNREACHABLE.

    """
    present = [name for name in (WEIGHTS, CONFIG, CARD, MANIFESTS) if (folder / name).exists()]
    if present and not force:
        raise SettingsInvalid(
            f"{folder} holds {', '.join(present)} already", cure="Name another folder, or replace them with --force."
        )
    number = _number(run, version)
    partial = folder / _PARTIAL
    with disk_errors(folder):
        partial.mkdir(parents=True, exist_ok=True)
        digest = next(commit.version.digest for commit in run.commits if commit.version.number == number)
        history = connection.manifests(run.run_id)[: number + 1]
        if history:
            check_history(history, digest)
        wanted = _parts(run, number)
        sources = [_Source(connection, run.run_id, number, part) for part in wanted]
        manifests = [source.manifest() for source in sources]
        for (name, expected), manifest in zip(wanted.items(), manifests, strict=True):
            if manifest.digest != expected:
                what = f"{name or 'it'} is {expected.hex()[:12]}; the server sends {manifest.digest.hex()[:12]}"
                raise FsllmError("ROUND_BROKEN", f"Of version {number} {what}")
        payloads = [partial / f"{manifest.digest.hex()}.payload" for manifest in manifests]
        for stale in partial.iterdir():
            if stale not in payloads:
                stale.unlink()
        for source, manifest, payload in zip(sources, manifests, payloads, strict=True):
            _download(source, manifest, payload)
        parameters = _install(connection, run, number, manifests, payloads, digest, folder)
        if history:
            write_atomic(folder / MANIFESTS, json.dumps([*map(manifest_object, history)], indent=2).encode() + b"\n")
        for payload in payloads:
            payload.unlink()
        partial.rmdir()
    tensors = sum(len(manifest.tensors) for manifest in manifests)
    return Exported(run.run_id, run.name, number, str(folder), tensors, parameters, digest.hex())


def check_history(history: Sequence[RoundManifest], digest: bytes) -> None:
    """Check that the manifests are a chain, at whose end stands a version.

    Args:
        history: From round 0 on.
        digest: The version's.

    Raises:
        FsllmError: ROUND_BROKEN.

    """
    for round_, problems in enumerate(check_chain([Link(one.body, one.digest.hex()) for one in history])):
        if problems:
            raise FsllmError("ROUND_BROKEN", f"Round {round_}: {'; '.join(problems)}")
    made = decode(history[-1].body)["result"]["published"]
    if made != digest.hex():
        message = f"Version {len(history) - 1} is {digest.hex()[:12]}; its round's manifest says {made[:12]}"
        raise FsllmError("ROUND_BROKEN", message)


def _number(run: Run, version: int | None) -> int:
    known = sorted(commit.version.number for commit in run.commits)
    if version is None and known:
        return known[-1]
    if version is None or version not in known:
        wanted = "committed version" if version is None else f"version {version}"
        there = f"it has {known[0]} to {known[-1]}" if known else "no round is committed yet"
        raise FsllmError("VERSION_UNKNOWN", f"Run {run.name} ({run.run_id}) has no {wanted}; {there}")
    return version


def _parts(run: Run, version: int) -> dict[str, bytes]:
    """Return the digests of a version's parts by name, of the largest rank where it has several.

    A version in one piece is one part without a name.

    Raises:
        FsllmError: ROUND_BROKEN: the version is not made of the parts that the server names.

    """
    of = next(commit.version for commit in run.commits if commit.version.number == version)
    if not of.parts:
        return {"": of.digest}
    if version_digest([(part.name, part.digest.hex()) for part in of.parts]) != of.digest.hex():
        raise FsllmError("ROUND_BROKEN", f"Version {version} is not made of the parts that the server names")
    ranks = {part.name: split_part_name(part.name)[1] for part in of.parts}
    largest = max(ranks.values())
    return {part.name: part.digest for part in of.parts if ranks[part.name] in (0, largest)}


@dataclass(frozen=True, slots=True)
class _Source:
    """Where a part of a version comes from."""

    connection: Connection
    run_id: str
    version: int
    part: str

    def stream(self, offset: int = 0) -> Generator[Manifest | Piece, None, None]:
        """Yield the manifest, then the chunks of the payload from ``offset`` on, checksums verified."""
        request = ExportRunRequest(run_id=self.run_id, version=self.version, offset=offset, part=self.part)
        call = self.connection.exports(request)
        reader = ManifestReader()
        try:
            for wire in call:
                match parse_download(wire):
                    case Piece() as piece:
                        yield piece
                    case message:
                        if (manifest := reader.take(message)) is not None:
                            yield manifest
        except grpc.RpcError as error:
            raise explain(error, self.connection.server) from error
        finally:
            call.cancel()

    def manifest(self) -> Manifest:
        """Return what comes first."""
        stream = self.stream()
        first = next(stream, None)
        stream.close()
        if not isinstance(first, Manifest):
            raise Unavailable("CHUNK_CORRUPT", f"The server sent no manifest for version {self.version}")
        validate(first)
        return first


def _download(source: _Source, manifest: Manifest, payload: Path) -> None:
    """Fetch what is missing of the payload and verify the whole; a wrong whole is fetched once more from the start."""
    for again in (True, False):
        _fetch(source, manifest, payload)
        if payload_digest(manifest, payload) == manifest.digest:
            return
        payload.unlink()
        if not again:
            raise Unavailable(
                "DIGEST_MISMATCH", f"The payload of version {source.version} does not match its manifest's digest"
            )


def _fetch(source: _Source, manifest: Manifest, payload: Path) -> None:
    """Append what is missing, taking a broken stream up again as long as bytes advance."""
    left = _ATTEMPTS
    with payload.open("ab") as file:
        if file.tell() > manifest.payload_bytes:
            file.truncate(0)
        while (start := file.tell()) < manifest.payload_bytes:
            try:
                _append(source.stream(start), manifest, file)
            except Unavailable as error:
                left = _ATTEMPTS if file.tell() > start else left - 1
                if not left:
                    raise
                wait(error)


def _append(stream: Iterable[Manifest | Piece], manifest: Manifest, file: BinaryIO) -> None:
    for piece in stream:
        if isinstance(piece, Manifest):
            if piece.digest != manifest.digest:
                raise FsllmError("STATE_CORRUPT", "The version changed while it was downloaded")
            continue
        held = file.tell() - piece.offset
        if held < 0:
            raise Unavailable("CHUNK_CORRUPT", f"A chunk came at offset {piece.offset} instead of {file.tell()}")
        file.write(piece.data[held:])
    if file.tell() < manifest.payload_bytes:
        raise Unavailable("CHUNK_CORRUPT", f"The stream ended at {file.tell()} of {manifest.payload_bytes} bytes")


def _install(
    connection: Connection,
    run: Run,
    version: int,
    manifests: Sequence[Manifest],
    payloads: Sequence[Path],
    digest: bytes,
    folder: Path,
) -> int:
    """Write the three files in the order that marks completeness; returns the number of parameters."""
    # numpy, for this command only.
    from fsllm_client.trainer.export import as_peft
    from fsllm_common.algorithms import algorithm_class
    from fsllm_common.plan import Plan
    from fsllm_common.tensors import arrays

    # Only version 0's manifest needs to carry the configuration.
    text = manifests[0].adapter_config
    if not text:
        text = _Source(connection, run.run_id, 0, next(iter(_parts(run, 0)))).manifest().adapter_config
    config = json.loads(text) if text else {}
    if config.get("peft_type") == "SYNTHETIC":  # a noop run's, which PEFT would not know
        config = {}
    server = connection.call(connection.control.GetServer, GetServerRequest(), repeat=True)
    tensors = {
        name: array
        for manifest, payload in zip(manifests, payloads, strict=True)
        for name, array in arrays.decode(manifest, payload).items()
    }
    plan = Plan.model_validate_json(run.plan)
    tensors = dict(algorithm_class(plan.algorithm.name)(plan).exported(tensors))
    parameters = sum(array.size for array in tensors.values())
    exported, config = as_peft(tensors, config)
    about = card(run, version, digest.hex(), parameters, config, server.software_version)
    (folder / CONFIG).unlink(missing_ok=True)
    arrays.save_arrays(exported, folder / WEIGHTS, metadata={"format": "pt"})
    write_atomic(folder / CARD, about.encode())
    if config:
        write_atomic(folder / CONFIG, json.dumps(config, indent=2, sort_keys=True).encode() + b"\n")
    return parameters
