"""The server put together: what depends on what, in which order it starts, and in which it stops."""

import asyncio
import errno
import json
import os
import secrets
import shutil
import signal
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack, closing
from dataclasses import asdict, dataclass
from typing import Any, Final

import grpc
from grpc_health.v1 import health, health_pb2_grpc  # type: ignore[import-untyped]

from fsllm.v1.enrollment_pb2_grpc import add_EnrollmentServiceServicer_to_server
from fsllm_common.errors import SettingsInvalid, Unavailable
from fsllm_common.files import write_atomic
from fsllm_common.identity.credentials import ENROLLMENT_OPTIONS, SERVER_OPTIONS, server_credentials, with_keepalive
from fsllm_common.memory import give_back_start_up
from fsllm_common.plan import Plan
from fsllm_common.telemetry.logs import get_logger
from fsllm_common.telemetry.metrics import ServerMetrics
from fsllm_common.telemetry.notify import notify
from fsllm_common.telemetry.web import WebServer
from fsllm_server.certificates import Certificates, open_authority
from fsllm_server.engine.engine import Engine
from fsllm_server.open_files import connections_possible
from fsllm_server.ports import try_port
from fsllm_server.service.attach import Attachments
from fsllm_server.service.boundary import Boundary
from fsllm_server.service.control import ControlService
from fsllm_server.service.disk_quota import DiskQuota
from fsllm_server.service.downloads import Downloads
from fsllm_server.service.enrollment import EnrollmentService
from fsllm_server.service.federation import FederationService
from fsllm_server.service.guard import Calls, Guard
from fsllm_server.service.pace import PaceLimits
from fsllm_server.service.rates import CallRate
from fsllm_server.service.uploads import Uploads
from fsllm_server.settings import ServerSettings
from fsllm_server.store.blobs import Blobs
from fsllm_server.store.database import Database
from fsllm_server.store.events import EventLog
from fsllm_server.store.folder import StateFolder
from fsllm_server.store.invites import Invites
from fsllm_server.store.members import Members
from fsllm_server.store.restored import RESTORED, Restoration, forget
from fsllm_server.store.spools import Spools
from fsllm_server.web.readiness import Readiness

log = get_logger()

OPTIONS: Final = (*SERVER_OPTIONS, ("grpc.max_concurrent_streams", 64))
"""Of the main port. A daemon needs three streams on its connection."""

ENROLLMENTS_AT_ONCE: Final = 256
"""Connections to the enrolment port, and calls. Strangers reach it, and each connection takes about 60 KiB."""

SERVER_FILE: Final = "server.json"
"""In the state folder while the server serves: ``Started`` for tools on this host."""


@dataclass(frozen=True, slots=True)
class Started:
    """Where a server answers."""

    server: str
    """host:port for callers on this host."""
    port: int
    enrollment_port: int
    metrics_port: int
    federation: str
    pid: int
    first_start: bool


async def serve(settings: ServerSettings, plan: Plan | None, started: Callable[[Started], None]) -> None:
    """Run the server until SIGTERM or SIGINT.

    Args:
        settings: Validated.
        plan: Submitted as a run once the server serves.
        started: Called when the ports answer.

    Raises:
        FsllmError: STATE_LOCKED, PORT_IN_USE, SETTING_INVALID, DISK_FULL, STATE_CORRUPT, STATE_NEWER.

    """
    async with AsyncExitStack() as stack:
        # What it keeps.
        state = stack.enter_context(closing(StateFolder(settings.state_dir)))
        database = stack.enter_context(closing(Database(settings.database or state.database_url)))
        members = Members(database)
        authority, federation, first = open_authority(state.root, settings.federation, known=bool(members.list()))
        metrics = ServerMetrics()
        metrics.disk_free_bytes.set_function(lambda: shutil.disk_usage(state.root).free)
        invites = Invites(database, members, federation)
        certificates = Certificates(state.root, authority, federation, settings, members, metrics)

        # What it does.
        spools = Spools(state.spools)
        engine = Engine(EventLog(database), Blobs(state.blobs), spools, metrics, retention=settings.retention)
        calls = Calls(settings.max_calls, settings.calls_per_member)
        rate = CallRate(settings.calls_per_minute)
        attachments = Attachments(engine, metrics, settings.messages_per_second)
        pace = PaceLimits(settings.upload_stall_seconds, settings.transfer_least_rate)
        quota = DiskQuota(state.spools, settings.member_disk_bytes)
        uploads = Uploads(engine, spools, settings.uploads_at_once, pace, quota, metrics)
        downloads = Downloads(engine, settings.chunks_at_once, pace, metrics)
        healthy = health.aio.HealthServicer()
        control = ControlService(
            settings, engine, attachments, calls, members, invites, authority, certificates, federation
        )

        # How it is reached.
        connections = ("grpc.max_allowed_incoming_connections", connections_possible(settings.max_connections))
        options = with_keepalive(OPTIONS, settings.keepalive_seconds)
        main = grpc.aio.server(
            interceptors=[Guard(federation, members, calls, rate, metrics)], options=(*options, connections)
        )
        sites = FederationService(engine, attachments, downloads, uploads, members, authority, settings.life_of)
        sites.add_to(main)
        control.add_to(main)
        health_pb2_grpc.add_HealthServicer_to_server(healthy, main)
        enrollment = grpc.aio.server(
            interceptors=[Boundary(metrics)],
            options=(*ENROLLMENT_OPTIONS, ("grpc.max_allowed_incoming_connections", ENROLLMENTS_AT_ONCE)),
            maximum_concurrent_rpcs=ENROLLMENTS_AT_ONCE,
        )
        newcomers = EnrollmentService(authority, invites, settings.life_of, settings.join_attempts_per_minute, metrics)
        add_EnrollmentServiceServicer_to_server(newcomers, enrollment)
        stack.push_async_callback(main.stop, 0)
        stack.push_async_callback(enrollment.stop, 0)
        port = _open(main, settings.listen, settings.port, "--port", certificates, require_client=True)
        enrollment_port = _open(
            enrollment,
            settings.listen,
            settings.chosen_enrollment_port,
            "--enrollment-port",
            certificates,
            require_client=False,
        )
        control.ports = (port, enrollment_port)
        readiness = Readiness(database, state.root)
        web = WebServer(settings.metrics_listen, settings.metrics_port, metrics.registry, readiness.checks())
        stack.callback(web.stop)

        # Start, wait, stop.
        stop = _stop_signal()
        await engine.start(Restoration.load(state.root / RESTORED))
        forget(state.root / RESTORED)
        for member in members.list():
            if member.standing == "revoked":  # the server may have ended before its runs had heard of it
                await engine.forget_member(member.name)
        await certificates.issue_operator()
        await main.start()
        await enrollment.start()
        web.start()
        readiness.serving = True
        here = Started(f"{settings.local_host}:{port}", port, enrollment_port, web.port, federation, os.getpid(), first)
        write_atomic(state.root / SERVER_FILE, json.dumps(asdict(here), indent=2).encode() + b"\n", mode=0o600)
        stack.callback((state.root / SERVER_FILE).unlink, missing_ok=True)
        log.info("serving", **asdict(here))
        started(here)
        give_back_start_up()
        notify("READY=1")
        if plan is not None:
            log.info("run submitted", run=await engine.submit(plan, request_id=secrets.token_hex(16)), name=plan.name)
        await _until(stop, certificates.keep_fresh(), engine.sweeper.keep_swept())

        log.info("stopping")
        notify("STOPPING=1")
        readiness.serving = False
        await healthy.enter_graceful_shutdown()
        await engine.stop()
        calls.end_all(Unavailable("SERVER_STOPPING", "The server is stopping", retry_after=1.0))
        await asyncio.gather(main.stop(settings.stop_seconds), enrollment.stop(settings.stop_seconds))


def _open(
    server: grpc.aio.Server, listen: str, port: int, flag: str, certificates: Certificates, *, require_client: bool
) -> int:
    credentials = server_credentials(lambda: certificates.server, require_client=require_client)
    try:
        return server.add_secure_port(f"{listen}:{port}", credentials)
    except RuntimeError as error:
        # gRPC does not say why, so ask the system.
        try:
            try_port(listen, port)
        except OSError as cause:
            message = f"{flag}: {listen}:{port} can not be opened: {cause.strerror}"
            if cause.errno != errno.EADDRINUSE:
                raise SettingsInvalid(f"--listen, {message}", cure="Name an address of this host.") from error
        else:
            message = f"{flag}: {listen}:{port} can not be opened"
        raise Unavailable("PORT_IN_USE", message) from error


def _stop_signal() -> asyncio.Event:
    """Return the event that SIGTERM and SIGINT set."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    return stop


async def _until(stop: asyncio.Event, *chores: Coroutine[Any, Any, None]) -> None:
    """Return when told to stop; raise if one of the chores ends, which none ever should."""
    tasks: list[asyncio.Task[Any]] = [asyncio.create_task(work) for work in (stop.wait(), *chores)]
    done, pending = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in pending:
        task.cancel()
    for task in done:
        task.result()
