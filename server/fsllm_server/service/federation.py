"""The members' service: Attach, Download, Upload, UploadStatus, Renew."""

from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from datetime import timedelta

import grpc

from fsllm.v1 import federation_pb2, federation_pb2_grpc
from fsllm_common.errors import Refused
from fsllm_common.identity.authority import CertificateAuthority
from fsllm_common.identity.keys import Certificate
from fsllm_common.identity.names import Role
from fsllm_common.telemetry.logs import get_logger
from fsllm_common.tensors.manifest import DIGEST_SIZE
from fsllm_server.engine.engine import Engine
from fsllm_server.service.attach import Attachments, greeting
from fsllm_server.service.boundary import Context, register
from fsllm_server.service.downloads import Downloads
from fsllm_server.service.guard import caller
from fsllm_server.service.uploads import Uploads
from fsllm_server.store.members import Members

SERVICE = federation_pb2.DESCRIPTOR.services_by_name["FederationService"].full_name

log = get_logger()


class FederationService(federation_pb2_grpc.FederationServiceServicer):
    """Hands what members say to the engine, and what the engine says to members. Add it with ``add_to``."""

    # The methods' names are the contract's.
    # ruff: noqa: N802

    def __init__(
        self,
        engine: Engine,
        attachments: Attachments,
        downloads: Downloads,
        uploads: Uploads,
        members: Members,
        authority: CertificateAuthority,
        life_of: Callable[[Role], timedelta],
    ) -> None:
        self._engine = engine
        self._attachments = attachments
        self._downloads = downloads
        self._uploads = uploads
        self._members = members
        self._authority = authority
        self._life_of = life_of

    def add_to(self, server: grpc.aio.Server) -> None:
        """Register with a server: the two that carry payloads with raw frames, the others as generated."""
        raw = {
            "Download": grpc.unary_stream_rpc_method_handler(
                self.Download, federation_pb2.DownloadRequest.FromString, response_serializer=None
            ),
            "Upload": grpc.stream_stream_rpc_method_handler(
                self.Upload,
                request_deserializer=None,
                response_serializer=federation_pb2.UploadResponse.SerializeToString,
            ),
        }
        register(server, SERVICE, self, federation_pb2_grpc.add_FederationServiceServicer_to_server, raw)
        # Newer gRPC looks at registered handlers before generic ones, and there the last one said counts.
        server.add_registered_method_handlers(SERVICE, raw)

    async def Attach(
        self, request_iterator: AsyncIterator[federation_pb2.AttachRequest], context: Context
    ) -> AsyncIterator[federation_pb2.AttachResponse]:
        """Push orders, hear answers."""
        hello = await greeting(request_iterator)
        async with aclosing(self._attachments.serve(caller(), hello, request_iterator)) as responses:
            async for response in responses:
                yield response

    def Download(  # type: ignore[override] # raw frames, not messages
        self, request: federation_pb2.DownloadRequest, context: Context
    ) -> AsyncGenerator[bytes]:
        """Send a version from an offset."""
        return self._downloads.send(caller().name, request)

    def Upload(  # type: ignore[override] # raw frames, not messages
        self, request_iterator: AsyncIterator[bytes], context: Context
    ) -> AsyncGenerator[federation_pb2.UploadResponse]:
        """Take an update in."""
        return self._uploads.take(caller().name, request_iterator)

    async def UploadStatus(
        self, request: federation_pb2.UploadStatusRequest, context: Context
    ) -> federation_pb2.UploadStatusResponse:
        """Say what is held of an update."""
        if len(request.digest) not in (0, DIGEST_SIZE):
            raise Refused("MESSAGE_INVALID", f"digest has {len(request.digest)} bytes instead of {DIGEST_SIZE}")
        if not request.digest:
            return federation_pb2.UploadStatusResponse()  # nothing is held of nothing
        return self._engine.upload_status(caller().name, request.run_id, request.round, request.digest)

    async def Renew(self, request: federation_pb2.RenewRequest, context: Context) -> federation_pb2.RenewResponse:
        """Give the caller its next certificate."""
        member = caller()
        chain = self._authority.issue(request.csr, member, self._life_of(member.role))
        await self._members.renew(member, Certificate.parse(chain))
        log.info("certificate renewed")
        return federation_pb2.RenewResponse(certificate_chain=chain)
