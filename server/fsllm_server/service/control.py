"""The operators' service: runs, members, and the server itself."""

import shutil
from collections.abc import AsyncGenerator
from contextlib import aclosing
from datetime import UTC, datetime, timedelta

import grpc

from fsllm.v1 import control_pb2, control_pb2_grpc
from fsllm_common import __version__
from fsllm_common.errors import Refused, SettingsInvalid
from fsllm_common.identity.authority import CertificateAuthority
from fsllm_common.identity.names import Member
from fsllm_common.plan.load import plan_from_json
from fsllm_common.telemetry.logs import get_logger
from fsllm_server.certificates import LOCAL_OPERATOR, Certificates
from fsllm_server.engine.engine import Engine
from fsllm_server.service.attach import Attachments
from fsllm_server.service.boundary import Context, Handler, register
from fsllm_server.service.downloads import send_version
from fsllm_server.service.guard import Calls, caller, this_call
from fsllm_server.settings import ServerSettings
from fsllm_server.store.invites import LONGEST, Invites
from fsllm_server.store.members import MemberRecord, Members

SERVICE = control_pb2.DESCRIPTOR.services_by_name["ControlService"].full_name

log = get_logger()


class ControlService(control_pb2_grpc.ControlServiceServicer):
    """Hands what operators want to the engine and to the members' records. Add it with ``add_to``."""

    # The methods' names are the contract's.
    # ruff: noqa: N802

    def __init__(
        self,
        settings: ServerSettings,
        engine: Engine,
        attachments: Attachments,
        calls: Calls,
        members: Members,
        invites: Invites,
        authority: CertificateAuthority,
        certificates: Certificates,
        federation: str,
    ) -> None:
        self._settings = settings
        self._engine = engine
        self._attachments = attachments
        self._calls = calls
        self._members = members
        self._invites = invites
        self._authority = authority
        self._certificates = certificates
        self._federation = federation
        self.ports = (0, 0)
        """The main and the enrolment port, once they are open: what join files say."""

    def add_to(self, server: grpc.aio.Server) -> None:
        """Register with a server: the export with raw frames, the others as generated."""
        raw: dict[str, Handler] = {
            "ExportRun": grpc.unary_stream_rpc_method_handler(
                self.ExportRun, control_pb2.ExportRunRequest.FromString, response_serializer=None
            )
        }
        register(server, SERVICE, self, control_pb2_grpc.add_ControlServiceServicer_to_server, raw)
        # Newer gRPC looks at registered handlers before generic ones, and there the last one said counts.
        server.add_registered_method_handlers(SERVICE, raw)

    # Runs.

    async def SubmitRun(self, request: control_pb2.SubmitRunRequest, context: Context) -> control_pb2.SubmitRunResponse:
        """Check the plan and start a run."""
        plan = plan_from_json(request.plan)
        run = await self._engine.submit(plan, request.request_id)
        log.info("run submitted", run=run, name=plan.name)
        return control_pb2.SubmitRunResponse(run=self._engine.get_run(run))

    async def ListRuns(self, request: control_pb2.ListRunsRequest, context: Context) -> control_pb2.ListRunsResponse:
        """List the runs."""
        return control_pb2.ListRunsResponse(runs=self._engine.list_runs())

    async def GetRun(self, request: control_pb2.GetRunRequest, context: Context) -> control_pb2.GetRunResponse:
        """Show a run."""
        return control_pb2.GetRunResponse(run=self._engine.get_run(request.run_id))

    async def WatchRun(
        self, request: control_pb2.WatchRunRequest, context: Context
    ) -> AsyncGenerator[control_pb2.WatchRunResponse]:
        """Send a run's events as they come."""
        async for event in self._engine.watch(request.run_id, request.after_sequence):
            yield event

    async def PauseRun(self, request: control_pb2.PauseRunRequest, context: Context) -> control_pb2.PauseRunResponse:
        """Pause a run."""
        await self._engine.pause(request.run_id)
        return control_pb2.PauseRunResponse(run=self._engine.get_run(request.run_id))

    async def ResumeRun(self, request: control_pb2.ResumeRunRequest, context: Context) -> control_pb2.ResumeRunResponse:
        """Go on with a paused run."""
        await self._engine.resume(request.run_id)
        return control_pb2.ResumeRunResponse(run=self._engine.get_run(request.run_id))

    async def CancelRun(self, request: control_pb2.CancelRunRequest, context: Context) -> control_pb2.CancelRunResponse:
        """End a run."""
        await self._engine.cancel(request.run_id)
        return control_pb2.CancelRunResponse(run=self._engine.get_run(request.run_id))

    def ExportRun(  # type: ignore[override] # raw frames, not messages
        self, request: control_pb2.ExportRunRequest, context: Context
    ) -> AsyncGenerator[bytes]:
        """Send a committed version."""
        number = request.version if request.HasField("version") else None
        stored = self._engine.version(request.run_id, number, request.part)
        return send_version(stored, request.offset)

    async def ListManifests(
        self, request: control_pb2.ListManifestsRequest, context: Context
    ) -> AsyncGenerator[control_pb2.ListManifestsResponse]:
        """Send the manifests of a run's committed rounds."""
        for manifest in self._engine.manifests(request.run_id):
            yield control_pb2.ListManifestsResponse(manifest=manifest)

    async def VerifyRun(
        self, request: control_pb2.VerifyRunRequest, context: Context
    ) -> AsyncGenerator[control_pb2.VerifyRunResponse]:
        """Look at a run's committed rounds again."""
        round_ = request.round if request.HasField("round") else None
        async with aclosing(self._engine.verify(request.run_id, round_)) as responses:
            async for response in responses:
                yield response

    # Members.

    async def Invite(self, request: control_pb2.InviteRequest, context: Context) -> control_pb2.InviteResponse:
        """Make a join token."""
        member = Member.of(self._federation, request.role, request.name)
        if request.valid_seconds > LONGEST.total_seconds():  # before it overflows a timedelta
            raise SettingsInvalid(f"A join token lives up to {LONGEST.days} days, not {request.valid_seconds} seconds")
        token, expires = await self._invites.invite(member, timedelta(seconds=request.valid_seconds))
        log.info("invited", name=member.name, role=str(member.role), until=f"{expires:%Y-%m-%d %H:%M} UTC")
        answer = control_pb2.InviteResponse(
            token=token,
            ca_certificate=self._authority.pem,
            federation=self._federation,
            port=self.ports[0],
            enrollment_port=self.ports[1],
            host=self._settings.public_host,
        )
        answer.expires.FromDatetime(expires)
        return answer

    async def ListMembers(
        self, request: control_pb2.ListMembersRequest, context: Context
    ) -> control_pb2.ListMembersResponse:
        """List the members, those invited too."""
        known = {record.name: self._shown(record) for record in self._members.list()}
        for invitation in await self._invites.open():
            invited = invitation.member
            known[invited.name] = control_pb2.Member(name=invited.name, role=str(invited.role), standing="invited")
        return control_pb2.ListMembersResponse(members=[known[name] for name in sorted(known)])

    async def RevokeMember(
        self, request: control_pb2.RevokeMemberRequest, context: Context
    ) -> control_pb2.RevokeMemberResponse:
        """Revoke a member: its certificates, its invitation, its live calls, its place in every round."""
        name = request.name
        withdrawn = await self._invites.withdraw(name)
        if withdrawn and self._members.get(name) is None:
            return control_pb2.RevokeMemberResponse(member=control_pb2.Member(name=name, standing="revoked"))
        record = await self._members.revoke(name)
        log.warning("revoked", name=name, role=str(record.role), by=caller().name)
        self._calls.end_member(name, Refused("MEMBER_REVOKED", f"{name} has been revoked"))
        await self._engine.forget_member(name)
        if name == LOCAL_OPERATOR:
            # Whoever may read the state folder is an operator anyway: revoking makes old copies void.
            await self._certificates.issue_operator()
        return control_pb2.RevokeMemberResponse(member=self._shown(record))

    async def GetServer(self, request: control_pb2.GetServerRequest, context: Context) -> control_pb2.GetServerResponse:
        """Say how the server fares."""
        answer = control_pb2.GetServerResponse(
            software_version=__version__,
            federation=self._federation,
            disk_free_bytes=shutil.disk_usage(self._settings.state_dir).free,
            attached_members=len(self._attachments),
            key_exchange_group=this_call().peer.key_exchange_group,
        )
        answer.now.FromDatetime(datetime.now(UTC))
        answer.certificate_not_after.FromDatetime(self._certificates.server.certificate.not_after)
        return answer

    def _shown(self, record: MemberRecord) -> control_pb2.Member:
        shown = control_pb2.Member(name=record.name, role=str(record.role), standing=record.standing)
        shown.certificate_not_after.FromDatetime(record.not_after)
        if (hello := self._attachments.hello(record.name)) is not None and record.standing == "enrolled":
            shown.attached = True
            shown.software_version = hello.software_version
            shown.capabilities.CopyFrom(hello.capabilities)
        return shown
