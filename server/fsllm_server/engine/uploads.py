"""Which uploads are wanted, and what is recorded of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from fsllm.v1 import federation_pb2
from fsllm.v1.tensors_pb2 import Manifest
from fsllm_common.errors import FsllmError, Refused, UpdateRejected
from fsllm_common.pipeline import largest_norm
from fsllm_common.tensors.manifest import DIGEST_SIZE, MAX_TENSORS, WIDTH, WIRE_TYPES, fits, split_part_name, validate
from fsllm_server.engine import core, events, views
from fsllm_server.engine.phases.agreement import refuse_other_model
from fsllm_server.engine.reducing import installed_algorithm
from fsllm_server.engine.runner import Runner
from fsllm_server.engine.state import Run, Version
from fsllm_server.store.blobs import Blobs
from fsllm_server.store.spools import Spools, VerifiedSpool

MAX_VERSION_ZERO: Final = 16 << 30
"""Bytes of the largest adapter that a site may bring; every later upload is as large as the version it starts from."""

MAX_COUNT: Final = 1 << 48
"""Of examples, tokens and steps: any larger number is a lie, and would drown the others' weights."""


@dataclass(frozen=True, slots=True)
class Expected:
    """An upload that is wanted: open ``Spools.open(run_id, round, member, manifest)`` for it."""

    run_id: str
    round: int
    member: str
    manifest: Manifest
    max_norm: float | None
    begin: federation_pb2.UploadBegin


class Uploads:
    """Judges what members announce by the run's state; changes nothing."""

    def __init__(self, blobs: Blobs, spools: Spools, clock: Callable[[], float]) -> None:
        self._blobs = blobs
        self._spools = spools
        self._clock = clock

    def expect(
        self, runner: Runner, member: str, begin: federation_pb2.UploadBegin
    ) -> federation_pb2.Receipt | Expected:
        """See ``Engine.expect_upload``. Of a manifest that is not whole yet, what it states is judged."""
        run, manifest = runner.run, begin.manifest
        if (receipt := self.receipt(run, member, begin.round, manifest.digest)) is not None:
            return receipt
        if core.recorded(run, begin.round, member) is not None:
            raise Refused("UPDATE_CONFLICT", f"{member} has delivered another update for round {begin.round}")
        order = core.wanted_order(run, member, begin.order_id, begin.round)
        if begin.base_digest.hex() != (order.base.digest if order.base is not None else ""):
            number = order.base.number if order.base is not None else None
            message = f"The order starts from version {number}" if number is not None else "Version 0 has no base"
            raise UpdateRejected("BASE_STALE", f"{message}, not from {begin.base_digest.hex()[:12] or 'nothing'}")
        if max(begin.examples, begin.tokens, begin.steps) > MAX_COUNT:
            raise UpdateRejected(
                "MANIFEST_INVALID", f"An update can not count more than {MAX_COUNT} examples or tokens"
            )
        if len(begin.model_digest) not in (0, DIGEST_SIZE):
            raise UpdateRejected("MANIFEST_INVALID", f"A model's digest has {DIGEST_SIZE} bytes")
        refuse_other_model(run, begin.round, member, begin.model_digest.hex())
        if order.base is not None:
            base = self._wanted(run, order.round, order.base)
            _check_size(manifest, len(base.tensors), base.payload_bytes * 2)
            if manifest.adapter_config:
                raise UpdateRejected("MANIFEST_INVALID", "Only version 0 carries adapter_config")
            if not manifest.tensor_count:
                fits(manifest, base, WIRE_TYPES[run.plan.wire.element_type])
        else:
            _check_size(manifest, MAX_TENSORS, MAX_VERSION_ZERO)
            if not manifest.tensor_count:
                _check_version_zero(manifest)
        elements = manifest.payload_bytes // WIDTH[WIRE_TYPES[run.plan.wire.element_type]]
        max_norm = largest_norm(run.plan, elements) if order.base is not None else None
        return Expected(run.id, begin.round, member, manifest, max_norm, begin)

    def _wanted(self, run: Run, round_: int, base: Version) -> Manifest:
        """Return the manifest of the tensors that a round changes, as its base version was published."""
        moving = installed_algorithm(run.plan.algorithm.name)(run.plan).moving(round_)
        parts = [part for part in base.parts if split_part_name(part.name)[0] in moving]
        manifests = [self._blobs.get(bytes.fromhex(part.digest)).manifest for part in parts]
        if len(manifests) == 1:
            return manifests[0]
        tensors = sorted((spec for manifest in manifests for spec in manifest.tensors), key=lambda spec: spec.name)
        return Manifest(tensors=tensors, payload_bytes=sum(manifest.payload_bytes for manifest in manifests))

    def receipt(self, run: Run, member: str, round_: int, digest: bytes) -> federation_pb2.Receipt | None:
        """Return the receipt of a payload that is recorded, else None."""
        update = core.recorded(run, round_, member)
        if update is None or update.digest != digest.hex():
            return None
        return federation_pb2.Receipt(digest=digest, payload_bytes=update.payload_bytes, duplicate=True)

    def status(self, run: Run | None, member: str, round_: int, digest: bytes) -> federation_pb2.UploadStatusResponse:
        """See ``Engine.upload_status``."""
        if run is None:
            return federation_pb2.UploadStatusResponse()
        over = core.is_over(run, member, round_)
        if (receipt := self.receipt(run, member, round_, digest)) is not None:
            held = receipt.payload_bytes
            return federation_pb2.UploadStatusResponse(committed_offset=held, receipt=receipt, round_over=over)
        held = self._spools.offset(run.id, round_, member, digest)
        return federation_pb2.UploadStatusResponse(committed_offset=held, round_over=over)

    def event(self, expected: Expected, spool: VerifiedSpool) -> events.UpdateRecorded:
        """Return the event that makes a verified upload count."""
        begin = expected.begin
        return events.UpdateRecorded(
            at=self._clock(),
            member=expected.member,
            order_id=begin.order_id,
            round=expected.round,
            digest=spool.manifest.digest.hex(),
            payload_bytes=spool.manifest.payload_bytes,
            norm=spool.norm,
            examples=begin.examples,
            tokens=begin.tokens,
            steps=begin.steps,
            metrics=views.metrics_of(begin.metrics),
            adapter_config=expected.manifest.adapter_config,
            element_type=_element_type(expected.manifest),
            model_digest=begin.model_digest.hex(),
        )

    def rejection(self, expected: Expected, error: FsllmError) -> events.UpdateRejected:
        """Return the event that tells of a refused upload."""
        return events.UpdateRejected(
            at=self._clock(),
            member=expected.member,
            round=expected.round,
            reason=error.reason,
            message=error.message,
        )


def _element_type(manifest: Manifest) -> str:
    """Return the one type of a judged manifest's tensors in the plan's words; fp32 when there are none."""
    found = manifest.tensors[0].element_type if manifest.tensors else WIRE_TYPES["fp32"]
    return next(word for word, element_type in WIRE_TYPES.items() if element_type == found)


def _check_size(manifest: Manifest, tensors: int, payload: int) -> None:
    """Refuse what states too much before anything of it is looked at."""
    count = manifest.tensor_count or len(manifest.tensors)
    if count > tensors or manifest.payload_bytes > payload:
        message = (
            f"The manifest states {count} tensors and {manifest.payload_bytes} bytes; at most {tensors} and {payload} "
            "are allowed here"
        )
        raise UpdateRejected("MANIFEST_INVALID", message)


def _check_version_zero(manifest: Manifest) -> None:
    validate(manifest)
    types = {spec.element_type for spec in manifest.tensors}
    if len(types) > 1:
        raise UpdateRejected("MANIFEST_INVALID", "The tensors of version 0 are not all of one element type")
