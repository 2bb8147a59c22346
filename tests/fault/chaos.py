"""The kill loop: a federation whose server and sites are killed and stopped at random instants, over and over.

    python tests/fault/chaos.py --kills 100 --seed 7          # or `make chaos`
    python tests/fault/chaos.py --kills 8 --train             # real training, trainers killed too

Real processes, real TLS, and a network that resets. While runs go on, one process after the other gets SIGKILL, or
SIGSTOP and later SIGCONT, at a random time or exactly at an armed failpoint (FSLLM_FAILPOINTS). Then every run must
have ended with the adapter, bit for bit, of its acknowledged updates and of an undisturbed federation; chaos_checks.py
has the whole list.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import grpc
import psutil
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

if __name__ == "__main__":  # from the repository's root or anywhere
    sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.fault.chaos_checks import Observed, check_run, check_sites, record_of
from tests.fault.plans import noop_plan, rows, train_plan
from tests.fault.proxy import Fault, Proxy
from tests.system.harness import ServerEnded, ServerProcess
from tests.system.runs import submit
from tests.system.site_process import SiteProcess

from fsllm.v1 import control_pb2 as control
from fsllm.v1.control_pb2_grpc import ControlServiceStub
from fsllm_common.failpoints import NAMES, VARIABLE

MIB: Final = 2**20
PATIENCE: Final = 4.0
"""Seconds that an armed process is given to reach its failpoint."""
STUCK: Final = 180.0
"""Seconds without a new round, with nobody struck any more, after which a run counts as stuck."""

SITE_POINTS: Final = ("file.", "folder.", "receipt.received", "parcel.")
SERVER_POINTS: Final = ("file.", "folder.", "spool.", "blob.", "event.", "receipt.send")

Process = ServerProcess | SiteProcess


@dataclass
class Report:
    """What was done and what is wrong; ``--json`` prints these fields."""

    seed: int
    folder: str
    strikes: Counter[str] = field(default_factory=Counter)
    points: Counter[str] = field(default_factory=Counter)
    """Failpoints where a process was struck."""
    rounds: int = 0
    runs: int = 0
    resumed: int = 0
    """Uploads that went on at an offset."""
    seconds: float = 0.0
    wrong: list[str] = field(default_factory=list)

    @property
    def kills(self) -> int:
        """SIGKILL and SIGSTOP together."""
        return sum(number for name, number in self.strikes.items() if not name.startswith("reset"))


class Federation:
    """A server and its sites; each site reaches it through a proxy of its own."""

    def __init__(self, folder: Path, sites: int, stack: ExitStack, fault: Fault) -> None:
        folder.mkdir(parents=True)
        self.server = stack.enter_context(ServerProcess(folder / "server", "--keepalive-seconds", "2"))
        target = ("127.0.0.1", self.server.port)
        self.proxies = [stack.enter_context(Proxy(target, fault=fault)) for _ in range(sites)]
        self.sites: list[SiteProcess] = []
        for at, proxy in enumerate(self.proxies):
            state, data = folder / f"site-{at}", folder / f"rows-{at}.jsonl"
            data.write_text("".join(json.dumps(row) + "\n" for row in rows(at)))
            site = SiteProcess(self.server, state, data, "--server", proxy.address, "--keepalive-seconds", "2")
            self.sites.append(stack.enter_context(site))
        for site in self.sites:
            site.await_log("attached")
        channel = stack.enter_context(self.server.channel(self.server.operator()))
        self._control = ControlServiceStub(channel)

    def run(self, run: str) -> control.Run | None:
        """Return a run as the server shows it; None while the server is away."""
        with suppress(grpc.RpcError):
            return self._control.GetRun(control.GetRunRequest(run_id=run), timeout=2).run
        return None

    def submit(self, plan: Mapping[str, Any]) -> str:
        """Start a run."""
        return submit(self.server, dict(plan))

    def await_end(self, run: str, meanwhile: Callable[[], None] = lambda: None) -> control.Run | None:
        """Return the run once it has ended or paused; None when no round has come for too long."""
        rounds, since = -1, time.monotonic()
        while time.monotonic() - since < STUCK:
            found = self.run(run)
            if found is not None and found.round > rounds:
                rounds, since = found.round, time.monotonic()
            if found is not None and found.status != control.RUN_STATUS_RUNNING:
                return found
            meanwhile()
            time.sleep(0.1)
        return None


class Chaos:
    """Strikes at the processes of a federation."""

    def __init__(self, federation: Federation, report: Report, *, trains: bool) -> None:
        self._federation = federation
        self._report = report
        self._random = random.Random(report.seed)  # noqa: S311 - to be played again
        self._trains = trains
        self._points: dict[type[Process], list[str]] = {ServerProcess: [], SiteProcess: []}
        self._armed: dict[Process, str] = {}
        """What struck, or may yet strike, a process that was started with a failpoint."""
        self.observed: list[Observed] = []

    def pause(self, least: float = 0.05, most: float = 1.5) -> None:
        """Let the federation work for a random time: the instants of the strikes are the point of it all."""
        time.sleep(self._random.uniform(least, most))

    def strike(self) -> None:
        """Do one thing to one process, and see that it runs again."""
        server, sites, proxies = self._federation.server, self._federation.sites, self._federation.proxies
        victim: Process = server if self._random.random() < 0.3 else self._random.choice(sites)
        way = self._random.choices(("kill", "stop", "armed", "reset", "trainer"), (40, 15, 35, 10, 30 * self._trains))[
            0
        ]
        match way:
            case "kill":
                self._kill(victim)
                self._start(victim)
            case "stop":
                self._stop(victim)
            case "armed":
                self._arm(victim)
            case "reset":
                self._random.choice(proxies).inflict_live(
                    Fault(
                        reset_after=self._random.randrange(2 * MIB), bytes_per_second=proxies[0].fault.bytes_per_second
                    )
                )
                self._report.strikes["reset of a connection"] += 1
            case "trainer":
                self._kill_trainer(self._random.choice(sites))

    def _kill(self, victim: Process) -> None:
        point = self._armed.pop(victim, "")
        code = victim.process.poll()
        if code is None:
            victim.kill()
        elif code != -signal.SIGKILL or not point:
            self._report.wrong.append(f"{victim.state.name} has ended by itself with exit code {code}")
        self._note("kill", victim, point if code is not None else "")
        self.observed.append(Observed.now(self._federation.server))

    def _note(self, what: str, victim: Process, point: str = "") -> None:
        whom = "the server" if isinstance(victim, ServerProcess) else "a site"
        self._report.strikes[f"{what} of {whom}"] += 1
        if point:
            self._report.points[point] += 1

    def revive(self) -> None:
        """See that everyone runs: who was armed may have struck itself at any time."""
        for process in (self._federation.server, *self._federation.sites):
            state = _state(process)
            if state == "T":
                self.pause(0.1, 2.0)
                process.process.send_signal(signal.SIGCONT)
                self._note("stop", process, self._armed.pop(process, ""))
            elif state == "Z":
                self._kill(process)
                self._start(process)

    def _start(self, victim: Process) -> None:
        if isinstance(victim, SiteProcess):
            # With the join file, as a service unit has it: the first kill may come before the site is enrolled.
            victim.start("--join", str(victim.state.with_name(f"{victim.name}.join")))
            victim.environment.clear()
            return
        try:
            victim.restart()
        except ServerEnded as ended:
            # A failpoint may lie in the start itself.
            if ended.code != -signal.SIGKILL or not victim.environment:
                raise
            victim.environment.clear()
            self._kill(victim)
            victim.restart()
        finally:
            victim.environment.clear()

    def _stop(self, victim: Process) -> None:
        victim.process.send_signal(signal.SIGSTOP)
        self.pause(0.1, 4.0)
        victim.process.send_signal(signal.SIGCONT)
        self._note("stop", victim)

    def _arm(self, victim: Process) -> None:
        """Kill it and start it anew so that it strikes itself at a failpoint."""
        kind = type(victim)
        if not self._points[kind]:
            prefixes = SERVER_POINTS if kind is ServerProcess else SITE_POINTS
            self._points[kind] = [name for name in sorted(NAMES) if name.startswith(prefixes)]
            self._random.shuffle(self._points[kind])
        # Not stop for the server: that may come in its start, which is waited for.
        action = "kill" if kind is ServerProcess else self._random.choice(("kill", "stop"))
        point = f"{self._points[kind].pop()}={action}@{self._random.randint(1, 3)}"
        self._kill(victim)
        victim.environment[VARIABLE] = self._armed[victim] = point
        self._start(victim)
        ends = time.monotonic() + PATIENCE
        while time.monotonic() < ends and _state(victim) not in ("Z", "T"):
            time.sleep(0.05)
        self.revive()

    def _kill_trainer(self, site: SiteProcess) -> None:
        with suppress(psutil.NoSuchProcess):
            for child in psutil.Process(site.process.pid).children(recursive=True):
                child.kill()
                self._report.strikes["kill of a trainer"] += 1

    def relieve(self) -> None:
        """Strike no more: everyone runs and the network is sound."""
        for proxy in self._federation.proxies:
            proxy.heal()


def _state(victim: Process) -> str:
    try:
        return Path(f"/proc/{victim.process.pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "Z"


def undisturbed(folder: Path, plan: Mapping[str, Any]) -> list[str]:
    """Return the digests of all versions of the same plan in a federation that nothing happens to."""
    with ExitStack() as stack:
        calm = Federation(folder, len(plan["cohort"]["sites"]), stack, Fault())
        run = calm.submit(plan)
        found = calm.await_end(run)
        if found is None or found.status != control.RUN_STATUS_DONE:
            raise AssertionError(
                f"the undisturbed run has not ended: {found.message if found else 'stuck'}; see {folder}"
            )
        return [commit.version.digest.hex() for commit in found.commits]


def play(
    folder: Path,
    report: Report,
    plan: Mapping[str, Any],
    kills: int,
    *,
    fault: Fault,
    tell: Callable[[int, str], None] = lambda done, what: None,
) -> None:
    """Strike ``kills`` times, let the runs end, and put what is wrong into the report."""
    began = time.monotonic()
    trains = plan["algorithm"]["name"] != "noop"
    names = plan["cohort"]["sites"]
    with ExitStack() as stack:
        federation = Federation(folder / "struck", len(names), stack, fault)
        chaos = Chaos(federation, report, trains=trains)
        runs = [federation.submit(plan)]
        while report.kills < kills:
            chaos.pause()
            chaos.revive()
            if (found := federation.run(runs[-1])) is not None and found.status != control.RUN_STATUS_RUNNING:
                runs.append(federation.submit(plan))
            chaos.strike()
            shown = f"run {len(runs)}, round {found.round if found is not None else '?'} of {plan['rounds']}"
            tell(report.kills, shown)
        chaos.relieve()
        tell(report.kills, "no more strikes; the last run ends")
        if federation.await_end(runs[-1], chaos.revive) is None:
            report.wrong.append(
                f"run {runs[-1]} is stuck: {found.message if (found := federation.run(runs[-1])) else '?'}"
            )
        tell(report.kills, "checking")
        records = [record_of(federation.server, run) for run in runs]
        report.runs, report.rounds = len(runs), sum(len(record["commits"]) - 1 for record in records)
        calm = undisturbed(folder / "undisturbed", plan)
        for record in records:
            report.wrong += check_run(federation.server, record, calm, closed_form=not trains)
        resumed, wrong = check_sites(federation.server, federation.sites, chaos.observed)
        report.resumed = resumed
        report.wrong += wrong
    report.seconds = time.monotonic() - began


@contextmanager
def _bar(kills: int, console: Console) -> Iterator[Callable[[int, str], None]]:
    columns = (
        TextColumn("kills"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("starting", total=kills)
        yield lambda done, what: progress.update(task, completed=min(done, kills), description=what)


def summary(report: Report) -> Table:
    """Return the report as people read it."""
    table = Table(title=f"chaos, seed {report.seed}: {report.kills} kills and stops in {report.seconds:.0f} s")
    table.add_column("what")
    table.add_column("times", justify="right")
    for name, number in sorted(report.strikes.items()):
        table.add_row(name, str(number))
    table.add_row("of these at a failpoint", str(report.points.total()))
    table.add_row("rounds committed", f"{report.rounds} in {report.runs} runs")
    table.add_row("uploads that went on at an offset", str(report.resumed))
    table.add_row("wrong", str(len(report.wrong)), style="bold red" if report.wrong else "green")
    return table


def as_json(report: Report) -> str:
    """Return the report as machines read it."""
    return json.dumps({**vars(report), "kills": report.kills}, indent=2)


def main() -> int:
    """Run as a command; 0: nothing is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, help="SIGKILL and SIGSTOP together; 100, or 8 with --train")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**31))
    parser.add_argument("--sites", type=int, help="4, or 2 with --train")
    parser.add_argument("--rounds", type=int, help="of each run; runs follow each other; 20, or 6 with --train")
    parser.add_argument("--mebibytes", type=float, default=6.0, help="size of the adapter")
    parser.add_argument("--train", action="store_true", help="really train, and kill trainers too")
    parser.add_argument("--out", type=Path, help="a new folder for logs and states; one in the temporary folder")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    arguments = parser.parse_args()
    folder = arguments.out or Path(tempfile.mkdtemp(prefix="fsllm-chaos-"))
    report = Report(arguments.seed, str(folder))
    console = Console(stderr=True)
    console.print(f"seed {report.seed}; logs and states in {folder}")
    names = [f"site-{at}" for at in range(arguments.sites or (2 if arguments.train else 4))]
    kills = arguments.kills or (8 if arguments.train else 100)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if arguments.train:
        plan = train_plan(names, arguments.rounds or 6)
    else:
        plan = noop_plan(names, arguments.rounds or 20, arguments.mebibytes)
    with _bar(kills, console) as tell:
        play(folder, report, plan, kills, fault=Fault(bytes_per_second=24 * MIB), tell=tell)
    if arguments.json:
        sys.stdout.write(as_json(report) + "\n")
    else:
        console.print(summary(report))
    for wrong in report.wrong:
        console.print(f"[red]wrong[/]: {wrong}", markup=True)
    if report.wrong:
        console.print(f"Play it again with --seed {report.seed}; logs and states are in {folder}")
    return 1 if report.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
