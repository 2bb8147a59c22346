"""Silence on the Attach stream, with a real engine."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from fsllm.v1.federation_pb2 import AttachRequest, Heartbeat, Hello
from fsllm_common.errors import FsllmError
from fsllm_common.identity.names import Member, Role
from fsllm_common.telemetry.metrics import ServerMetrics
from fsllm_server.engine.engine import Engine
from fsllm_server.service import attach
from fsllm_server.store.blobs import Blobs
from fsllm_server.store.database import Database
from fsllm_server.store.events import EventLog
from fsllm_server.store.spools import Spools

SITE = Member("f", Role.SITE, "a")


async def silence() -> AsyncIterator[AttachRequest]:
    await asyncio.Event().wait()
    yield AttachRequest()


async def test_a_greeting_that_does_not_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attach, "HELLO_SECONDS", 0.01)
    with pytest.raises(FsllmError) as error:
        await attach.greeting(silence())
    assert error.value.reason == "HELLO_EXPECTED"


@pytest.mark.slow
async def test_a_daemon_that_falls_silent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(attach, "SILENCE_SECONDS", 1.0)
    database = Database(f"sqlite:///{tmp_path / 'db.sqlite3'}")
    metrics = ServerMetrics()
    engine = Engine(EventLog(database), Blobs(tmp_path / "blobs"), Spools(tmp_path / "spools"), metrics)
    attachments = attach.Attachments(engine, metrics)
    heard = 0

    async def heartbeats() -> AsyncIterator[AttachRequest]:
        nonlocal heard
        for _ in range(6):  # together longer than the silence that ends it
            await asyncio.sleep(0.25)
            heard += 1
            yield AttachRequest(heartbeat=Heartbeat())
        await asyncio.Event().wait()

    try:
        await engine.start()
        responses = attachments.serve(SITE, Hello(protocol_version=1), heartbeats())
        assert (await anext(responses)).welcome.member == "a"
        assert attachments.hello("a") is not None
        with pytest.raises(FsllmError) as error:
            await anext(responses)
        assert (error.value.reason, error.value.retry_after) == ("SERVER_UNREACHABLE", 1.0)
        assert heard == 6
        assert attachments.hello("a") is None
        assert metrics.registry.get_sample_value("fsllm_server_attached_members", {"role": "site"}) == 0
        await engine.stop()
    finally:
        database.close()
