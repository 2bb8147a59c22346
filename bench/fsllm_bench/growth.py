"""What grows: many attached sites on one server, and many rounds in a row. ``python -m fsllm_bench.growth``."""

import asyncio
import json
import logging
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Iterable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Final

import click
import structlog
from rich.console import Console
from rich.progress import track

from fsllm.v1.control_pb2 import GetRunRequest, InviteRequest
from fsllm.v1.federation_pb2 import (
    ORDER_KIND_BUILD,
    ORDER_KIND_TRAIN,
    Answer,
    Capabilities,
    Done,
    Order,
    UploadBegin,
    Welcome,
    Withdraw,
)
from fsllm_bench.federation import Federation, cpu_seconds, federation, memory
from fsllm_bench.report import write_section
from fsllm_bench.rounds import round_seconds
from fsllm_client.link.attach import Attachment
from fsllm_client.link.channel import Link
from fsllm_client.link.download import Downloader, VersionCache
from fsllm_client.link.enroll import enroll
from fsllm_client.link.upload import Uploader
from fsllm_client.site import synthetic
from fsllm_client.site.outbox import Parcel
from fsllm_common.identity.join import JoinFile
from fsllm_common.identity.names import Role
from fsllm_common.plan import plan_from_json
from fsllm_common.telemetry.metrics import ClientMetrics
from fsllm_operator.connection import Connection

IDLE_SECONDS: Final = 60.0
TINY: Final = 1 / 1024
"""Mebibytes of the load generator's deltas: what counts here are orders, not bytes."""


class Site:
    """One site of the load generator: its own certificate, connection and stream, and deltas of a kilobyte."""

    def __init__(
        self, name: str, link: Link, folder: Path, heard: dict[int, list[float]], attached: asyncio.Event
    ) -> None:
        metrics = ClientMetrics()
        self._name = name
        self._folder = folder
        self._heard = heard
        self._attached = attached
        self._downloader = Downloader(link, VersionCache(folder), metrics)
        self._uploader = Uploader(link, metrics)
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self.attachment = Attachment(link, self, Capabilities(), metrics)

    def welcomed(self, welcome: Welcome) -> None:
        """Note it."""
        self._attached.set()

    def withdrawn(self, withdraw: Withdraw) -> None:
        """Stop."""
        if (task := self._tasks.pop(withdraw.order_id, None)) is not None:
            task.cancel()

    def held(self) -> Iterable[str]:
        """Return what is in hand."""
        return self._tasks

    def ordered(self, order: Order) -> None:
        """Do it."""
        if order.kind == ORDER_KIND_TRAIN:
            self._heard[order.round].append(time.time())
        self._tasks[order.order_id] = asyncio.create_task(self._do(order))

    async def _do(self, order: Order) -> None:
        if order.kind in (ORDER_KIND_BUILD, ORDER_KIND_TRAIN):
            await self._deliver(order)
        else:
            self.attachment.answer(Answer(order_id=order.order_id, done=Done()))
        self._tasks.pop(order.order_id, None)

    async def _deliver(self, order: Order) -> None:
        plan = plan_from_json(order.plan)
        payload = self._folder / "payload"
        if order.kind == ORDER_KIND_BUILD:
            manifest = synthetic.write_version_zero(plan, payload)
        else:
            (base,) = await self._downloader.fetch(order.run_id, order.base)
            value = synthetic.delta_value(self._name, order.round)
            manifest = synthetic.write_delta(plan, base.manifest, value, payload)
        begin = UploadBegin(
            order_id=order.order_id,
            run_id=order.run_id,
            round=order.round,
            base_digest=order.base.digest,
            manifest=manifest,
            examples=1,
            tokens=1,
            steps=1,
        )
        await self._uploader.deliver(Parcel(self._folder, begin))


@dataclass(frozen=True, slots=True)
class Crowd:
    """Many idle sites."""

    sites: int
    attach_seconds: float
    """Until all were attached, their enrolment not included."""
    kibibytes: float
    """Resident memory of the server for each."""
    cpu_milliseconds: float
    """The server's processor time for each and minute, idle."""
    hear_seconds: float
    """From a commit until the last site has the next round's order; the median of the rounds."""

    def text(self) -> str:
        """Return a sentence for the page."""
        return (
            f"{self.sites} attached sites, each with a certificate and a connection of its own: all were attached "
            f"{self.attach_seconds:.1f} s after they began; idle, each costs the server {self.kibibytes:.0f} KiB and "
            f"{self.cpu_milliseconds:.1f} ms of processor a minute; {self.hear_seconds:.2f} s after a commit the last "
            "has the next round's order."
        )


async def crowd(sites: int, rounds: int) -> Crowd:
    """Attach so many sites from this process, let them idle, then do some rounds with all of them."""
    with federation(0, "--join-attempts-per-minute", "1000000", "--max-connections", str(sites + 64)) as here:
        links = await _enroll(here, sites)
        heard: defaultdict[int, list[float]] = defaultdict(list)
        before = memory(here.pid, "VmRSS")
        async with AsyncExitStack() as stack:
            began = time.monotonic()
            events = []
            for number, link in enumerate(links):
                stack.push_async_callback(link.close)
                folder = here.folder / f"site-{number}"
                site = Site(f"site-{number}", link, folder, heard, event := asyncio.Event())
                task = asyncio.create_task(site.attachment.run())
                stack.callback(task.cancel)
                events.append(event)
            for event in events:
                await event.wait()
            attached = time.monotonic() - began
            cpu = cpu_seconds(here.pid)
            await asyncio.sleep(IDLE_SECONDS)
            cpu = cpu_seconds(here.pid) - cpu
            grown = memory(here.pid, "VmRSS") - before
            run = await asyncio.to_thread(here.run_rounds, "crowd", rounds, sites, TINY)
        at = {commit["round"]: datetime.fromisoformat(commit["at"]).timestamp() for commit in run["commits"]}
        waits = [max(heard[round_ + 1]) - at[round_] for round_ in at if len(heard[round_ + 1]) >= sites]
    return Crowd(sites, attached, grown * 1024 / sites, cpu * 60_000 / IDLE_SECONDS / sites, statistics.median(waits))


async def _enroll(here: Federation, sites: int) -> list[Link]:
    links = []
    server = f"localhost:{here.port}"
    with here.connection() as connection:
        for number in track(range(sites), "enrolling", console=Console(stderr=True), transient=True):
            folder = here.folder / f"site-{number}"
            folder.mkdir()
            answer = connection.call(
                connection.control.Invite, InviteRequest(name=f"site-{number}", role=Role.SITE, valid_seconds=3600)
            )
            join = JoinFile(
                federation=answer.federation,
                role=Role.SITE,
                name=f"site-{number}",
                host="localhost",
                port=answer.port,
                enrollment_port=answer.enrollment_port,
                ca_certificate=answer.ca_certificate.decode(),
                token=answer.token,
                expires=datetime.fromtimestamp(time.time() + 3600).astimezone(),
            )
            links.append(Link(server, await enroll(folder, server, join)))
    return links


@dataclass(frozen=True, slots=True)
class Sample:
    """What the server holds after some rounds."""

    rounds: int
    resident_mebibytes: float
    open_files: int
    spooled_files: int
    versions: int


@dataclass(frozen=True, slots=True)
class March:
    """Many rounds in a row."""

    samples: list[Sample]
    early_seconds: float
    """The median of rounds 11 to 30."""
    late_seconds: float
    """Of the last 20."""

    def text(self) -> str:
        """Return a sentence for the page."""
        first, last = self.samples[0], self.samples[-1]
        return (
            f"{last.rounds} rounds of 4 sites with 1 MiB: a round took {self.early_seconds:.3f} s early (rounds 11 to "
            f"30) and {self.late_seconds:.3f} s at the end; the server's memory was {first.resident_mebibytes:.0f} MiB "
            f"after {first.rounds} rounds and {last.resident_mebibytes:.0f} MiB at the end, its open files "
            f"{first.open_files} and {last.open_files}, the files of uploads {first.spooled_files} and "
            f"{last.spooled_files}. Each round's version stays, {last.versions} of them at the end: any can be "
            "exported."
        )


def march(rounds: int, sites: int = 4, mebibytes: float = 1) -> March:
    """Do so many rounds with real daemons, and look at the server every 20 rounds."""
    with federation(sites) as here:
        plan = here.write_plan("march", rounds, sites, mebibytes)
        here.fsllm("run", "submit", str(plan))
        samples: list[Sample] = []
        with here.connection() as connection:
            for due in track(range(20, rounds + 1, 20), "rounds", console=Console(stderr=True), transient=True):
                _await_round(connection, "march", due)
                samples.append(_sample(here, due))
        run = json.loads(here.fsllm("run", "show", "march", "--json"))
    seconds = round_seconds(run)
    return March(samples, statistics.median(seconds[10:30]), statistics.median(seconds[-20:]))


def _await_round(connection: Connection, run: str, round_: int) -> None:
    """Return when a round is committed. Asks: the stream of events would be one more thing that is measured."""
    while len(connection.call(connection.control.GetRun, GetRunRequest(run_id=run)).run.commits) <= round_:
        time.sleep(0.2)


def _sample(here: Federation, rounds: int) -> Sample:
    spooled = sum(len(files) for _, _, files in os.walk(here.state / "spools"))
    versions = sum(1 for folder in (here.state / "blobs").iterdir() if (folder / "payload").exists())
    open_files = len(list(Path(f"/proc/{here.pid}/fd").iterdir()))
    return Sample(rounds, memory(here.pid, "VmRSS"), open_files, spooled, versions)


@click.command()
@click.option("--sites", default=500, show_default=True, help="Idle sites, all in this process.")
@click.option("--rounds", default=100, show_default=True, help="Rounds in a row.")
@click.option("--write", default=None, type=click.Path(path_type=Path, exists=True), help="The page to write.")
def main(sites: int, rounds: int, write: Path | None) -> None:
    """Measure what many sites and many rounds cost the server."""
    # Of what five hundred sites in this process do, only what goes wrong.
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    texts = [asyncio.run(crowd(sites, 5)).text(), march(rounds).text()]
    for text in texts:
        click.echo(text)
    if write is not None:
        write_section(write, "growth", ["python -m fsllm_bench.growth"], "\n\n".join(f"- {text}" for text in texts))


if __name__ == "__main__":
    main()
