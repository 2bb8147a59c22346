"""The virtual operator: submits the run, watches it, meddles as the script says, and resumes it when it is paused."""

import asyncio
from typing import TYPE_CHECKING, Any

import grpc

from fsllm.v1 import control_pb2
from fsllm_common.errors import FsllmError
from fsllm_common.identity.names import Role
from fsllm_common.plan import canonical_json
from fsllm_common.rpc_errors import error_from
from simulation.identities import identity
from simulation.link import Link

if TYPE_CHECKING:
    from simulation.world import World

OPERATOR = "olga"
_METHODS: dict[str, tuple[type[Any], type[Any]]] = {
    "PauseRun": (control_pb2.PauseRunRequest, control_pb2.PauseRunResponse),
    "ResumeRun": (control_pb2.ResumeRunRequest, control_pb2.ResumeRunResponse),
    "CancelRun": (control_pb2.CancelRunRequest, control_pb2.CancelRunResponse),
    "GetRun": (control_pb2.GetRunRequest, control_pb2.GetRunResponse),
}
ENDED = (control_pb2.RUN_STATUS_DONE, control_pb2.RUN_STATUS_CANCELLED)


async def operate(world: "World") -> None:
    """Be the operator, until the run has ended."""
    await Operator(world).work()


class Operator:
    """One person at one terminal."""

    def __init__(self, world: "World") -> None:
        self._world = world
        self._link = Link(world, identity(Role.OPERATOR, OPERATOR))
        self._run = ""

    async def work(self) -> None:
        world = self._world
        self._run = (await self._submit()).run.run_id
        world.history.note("submitted", run=self._run)
        loop = asyncio.get_running_loop()
        tasks = [loop.create_task(self._meddle()), loop.create_task(self._watch())]
        while True:
            await asyncio.sleep(5.0)
            try:
                run = (await self._once("GetRun", run_id=self._run)).run
            except FsllmError:
                continue
            for commit in run.commits:
                world.history.commit_seen(OPERATOR, None, commit)
            if run.status in ENDED:
                world.history.note("end", status=control_pb2.RunStatus.Name(run.status).removeprefix("RUN_STATUS_"))
                break
            if run.status == control_pb2.RUN_STATUS_PAUSED and (world.quiet or world.chance.random() < 0.2):
                await self._until_done("ResumeRun", {"RUN_NOT_PAUSED", "RUN_ENDED"}, run_id=self._run)
        # A moment for what is still on its way. Then every site attaches once more, which a renewal of its certificate
        # brings about within a day: it asks what has become of results of a round that went on without it.
        await asyncio.sleep(60.0)
        for connection in list(world.network.connections.values()):
            connection.cut()
        await asyncio.sleep(60.0)
        for task in tasks:
            task.cancel()
        world.finished.set()

    async def _submit(self) -> control_pb2.SubmitRunResponse:
        """Submit until it is done: the same request again is the same run."""
        request = control_pb2.SubmitRunRequest(plan=canonical_json(self._world.script.plan), request_id="r" * 32)
        while True:
            try:
                answer: control_pb2.SubmitRunResponse = await self._link.control(
                    "SubmitRun", request, control_pb2.SubmitRunResponse
                )
            except grpc.aio.AioRpcError as error:
                self._world.history.note("told", method="SubmitRun", reason=error_from(error).reason)
                await asyncio.sleep(1.0)
            else:
                return answer

    async def _meddle(self) -> None:
        world = self._world
        for at, what, whom in world.script.orders:
            await asyncio.sleep(max(0.0, at - world.loop.now))
            if what == "revoke":
                request = control_pb2.RevokeMemberRequest(name=whom)
                await self._patiently("RevokeMember", request, control_pb2.RevokeMemberResponse, set())
                world.history.note("forgotten", member=whom)
            else:
                await self._until_done(f"{what.capitalize()}Run", {"RUN_ENDED", "RUN_NOT_PAUSED"}, run_id=self._run)

    async def _watch(self) -> None:
        """Hear of everything once, whatever breaks: the history takes note of it."""
        after = 0
        while True:
            call = self._link.watch(self._run, after)
            try:
                async for told in call:
                    if told.sequence:
                        self._world.history.note("told", sequence=told.sequence, kind=told.kind, about=told.subject)
                        after = told.sequence
            except grpc.aio.AioRpcError as error:
                self._world.history.note("told", method="WatchRun", reason=error_from(error).reason)
            else:
                return
            finally:
                call.cancel()
            await asyncio.sleep(1.0)

    async def _until_done(self, method: str, enough: set[str], **fields: Any) -> None:  # noqa: ANN401
        request, response = _METHODS[method]
        await self._patiently(method, request(**fields), response, enough)

    async def _patiently(self, method: str, request: Any, response: type[Any], enough: set[str]) -> None:  # noqa: ANN401
        """Call until there is an answer, or a reason that is as good as one."""
        while True:
            try:
                await self._link.control(method, request, response)
            except grpc.aio.AioRpcError as error:
                known = error_from(error)
                self._world.history.note("told", method=method, reason=known.reason)
                if known.reason in enough:
                    return
                await asyncio.sleep(known.retry_after or 1.0)
            else:
                return

    async def _once(self, method: str, **fields: Any) -> Any:  # noqa: ANN401
        request, response = _METHODS[method]
        try:
            return await self._link.control(method, request(**fields), response)
        except grpc.aio.AioRpcError as error:
            raise error_from(error) from error
