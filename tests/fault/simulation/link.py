"""``fsllm_client.link.channel.Link`` over the virtual network."""

import asyncio
from typing import TYPE_CHECKING, Any

import grpc

from fsllm.v1 import control_pb2, federation_pb2
from simulation.calls import Call, unary
from simulation.identities import Identity

if TYPE_CHECKING:
    from simulation.world import World

_FEDERATION = federation_pb2.DESCRIPTOR.services_by_name["FederationService"]
_CONTROL = control_pb2.DESCRIPTOR.services_by_name["ControlService"]


class Link:
    """The way to the server for one member."""

    def __init__(self, world: "World", credential: Identity) -> None:
        self._world = world
        self.server = "server:50051"
        self.credential = credential
        self.changed = asyncio.Event()
        self.stub = self

    def Attach(self) -> Call:  # noqa: N802 - the contract's name
        return self._call("Attach", federation_pb2.AttachRequest, federation_pb2.AttachResponse)

    def upload(self) -> Call:
        return self._call("Upload", None, federation_pb2.UploadResponse)

    def download(self, request: federation_pb2.DownloadRequest) -> Call:
        return self._call("Download", federation_pb2.DownloadRequest, None).ask(request)

    async def UploadStatus(  # noqa: N802
        self,
        request: federation_pb2.UploadStatusRequest,
        *,
        wait_for_ready: bool = False,
        timeout: float | None = None,  # noqa: ASYNC109 - gRPC's name
    ) -> federation_pb2.UploadStatusResponse:
        def call() -> Call:
            return self._call("UploadStatus", federation_pb2.UploadStatusRequest, federation_pb2.UploadStatusResponse)

        return await self._patiently(call, request, again=wait_for_ready, seconds=timeout)

    async def control(self, method: str, request: Any, response: type[Any]) -> Any:  # noqa: ANN401
        """Call a unary method of the operators' service, once."""
        path = f"/{_CONTROL.full_name}/{method}"
        call = Call(self._world.network, path, _bytes(type(request)), response.FromString, self.credential.chain)
        return await self._patiently(lambda: call, request, again=False, seconds=30.0)

    def watch(self, run: str, after: int) -> Call:
        path = f"/{_CONTROL.full_name}/WatchRun"
        request = control_pb2.WatchRunRequest(run_id=run, after_sequence=after)
        parse = control_pb2.WatchRunResponse.FromString
        return Call(self._world.network, path, _bytes(type(request)), parse, self.credential.chain).ask(request)

    def _call(self, method: str, request: type[Any] | None, response: type[Any] | None) -> Call:
        return Call(
            self._world.network,
            f"/{_FEDERATION.full_name}/{method}",
            _bytes(request),
            response.FromString if response is not None else None,
            self.credential.chain,
        )

    async def _patiently(self, call: Any, request: Any, *, again: bool, seconds: float | None) -> Any:  # noqa: ANN401
        """Make a unary call within a time; while nobody can be reached, ``again`` and again."""
        try:
            async with asyncio.timeout(seconds):
                while True:
                    try:
                        return await unary(call(), request)
                    except grpc.aio.AioRpcError as error:
                        if not again or not str(error.details()).startswith("connect"):
                            raise
                    await asyncio.sleep(1.0)
        except TimeoutError:
            metadata = grpc.aio.Metadata()
            raise grpc.aio.AioRpcError(
                grpc.StatusCode.DEADLINE_EXCEEDED, metadata, metadata, "Deadline Exceeded"
            ) from None


def _bytes(kind: type[Any] | None) -> Any:  # noqa: ANN401
    return (lambda message: message.SerializeToString()) if kind is not None else None
