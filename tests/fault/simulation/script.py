"""What a seed decides before anything happens: the plan, the sites, the server's settings, and the faults to come."""

import random
from dataclasses import dataclass, field
from typing import Any, Literal

from fsllm_common.identity.names import Role
from fsllm_common.plan import Plan
from simulation.site import Nature

QUIET_AFTER = (20.0, 100.0)
"""Seconds: when the faults stop."""
PATIENCE = 1000.0
"""Seconds after which a run in quiet must be done."""

SERVER_POINTS = (
    "spool.sync",
    "spool.synced",
    "spool.drop",
    "spool.dropped",
    "file.sync",
    "file.rename",
    "file.renamed",
    "folder.sync",
    "folder.synced",
    "blob.sync",
    "blob.synced",
    "blob.rename",
    "blob.renamed",
    "event.append",
    "event.appended",
    "database.commit",
    "database.committed",
    "receipt.send",
    "receipt.sent",
    "answer.send",
)
OWN_POINTS = frozenset({"upload.begin", "upload.chunk"})
"""Failpoints that are the simulation's own: it stands in for the code around them."""
SITE_POINTS = (
    "file.sync",
    "file.rename",
    "file.renamed",
    "folder.sync",
    "folder.synced",
    "ledger.sync",
    "ledger.synced",
    "receipt.received",
    "parcel.removed",
    "upload.begin",
    "upload.begin",
    "upload.chunk",
    "upload.chunk",
)
DISK_POINTS = ("spool.sync", "file.sync", "file.rename", "blob.sync", "blob.rename", "ledger.sync")
"""Where a full disk may show itself: just before something is written for good."""

ROUGH = 4
"""Power losses more, where it is rough."""


@dataclass(frozen=True)
class Fault:
    """Something that happens at a time."""

    at: float
    kind: Literal["kill", "power", "freeze", "full", "cut", "silence", "stall", "slow", "unreachable"]
    whom: str
    seconds: float


@dataclass
class Arm:
    """Something that happens when a process reaches a failpoint for the n-th time."""

    whom: str
    point: str
    count: int
    how: Literal["kill", "power", "full"]


@dataclass
class Script:
    """One seed's."""

    plan: Plan
    natures: list[Nature]
    server: dict[str, Any]
    quiet_at: float
    faults: list[Fault] = field(default_factory=list)
    arms: list[Arm] = field(default_factory=list)
    orders: list[tuple[float, str, str]] = field(default_factory=list)
    """What the operator does: when, which method, whom it concerns."""
    liar: bool = False


Rough = Literal["server", "sites", "liar", ""]
"""What there is more of than in other seeds: power losses of the server, of the sites, or a liar for certain."""


def write(chance: random.Random, rough: Rough = "") -> Script:
    """Make a script."""
    sites = chance.randint(1, 4)
    natures = [_nature(chance, f"site-{letter}") for letter in "abcd"[:sites]]
    if chance.random() < 0.3:
        natures.append(Nature("judge", Role.EVALUATOR, step_seconds=chance.uniform(0.1, 3)))
    spare = chance.randint(0, sites - 1)
    plan = _plan(chance, sites, sites - spare)
    quiet_at = chance.uniform(*QUIET_AFTER)
    server = {
        "uploads_at_once": chance.randint(1, 3),
        "upload_stall_seconds": chance.choice([5.0, 60.0]),
    }
    script = Script(plan, natures, server, quiet_at, liar=chance.random() < 0.35 or rough == "liar")
    names = [nature.name for nature in natures] + (["mallory"] if script.liar else [])
    # A third of the seeds have a calm time: what happens without faults must be seen too.
    if chance.random() < 0.9:
        _disturb(script, chance, names)
    _operate(script, chance, names[:spare] if spare else [])
    if rough in ("server", "sites"):
        for _ in range(ROUGH):
            whom = chance.choice(names) if rough == "sites" else "server"
            point = chance.choice(SITE_POINTS if rough == "sites" else SERVER_POINTS)
            script.arms.append(Arm(whom, point, 1 + int(chance.expovariate(1 / 4)), "power"))
    return script


def _nature(chance: random.Random, name: str) -> Nature:
    return Nature(
        name,
        step_seconds=chance.choice([0.1, 0.5, 2.0, 8.0]),
        steps=chance.randint(1, 5),
        examples=chance.randint(1, 50),
        fails=chance.choice([0, 0, 0.2]),
        stalls=chance.choice([0, 0, 0.02]),
    )


def _plan(chance: random.Random, sites: int, quorum: int) -> Plan:
    sampled = chance.random() < 0.3
    clipped = chance.random() < 0.2
    noised = clipped and chance.random() < 0.5
    proximal = chance.random() < 0.3
    seed = chance.randrange(1000)
    # Drawn from the seed alone, so that the rest of every script stays what it was.
    other = random.Random(seed)  # noqa: S311
    buffer = None
    if not sampled and other.random() < 0.25:
        buffer = {"size": other.randint(quorum, sites), "max_staleness": other.choice([0, 1, 3])}
    pipeline: list[dict[str, Any]] = [{"stage": "clip", "norm": 0.5}] if clipped else []
    if noised:
        pipeline.append({"stage": "noise", "multiplier": 1.0})
    return Plan.model_validate(
        {
            "name": "simulated",
            "seed": seed,
            "rounds": chance.randint(1, 5),
            "model": {"name": "m"},
            "algorithm": {
                "name": "fedprox" if proximal else "fedavg",
                "weighting": "uniform" if noised else chance.choice(["examples", "tokens", "uniform", "capped"]),
                "weight_cap": 20,
                "server_learning_rate": chance.choice([1.0, 0.7]),
                "parameters": {"mu": 0.1} if proximal else {},
            },
            "cohort": {
                "quorum": quorum,
                "size": quorum if sampled else None,
                "over_selection": chance.choice([1.0, 1.5, 2.0]) if sampled else 1.0,
                "buffer": buffer,
            },
            "timing": {
                "recruit_seconds": chance.choice([None, 30.0]),
                "gather_seconds": chance.choice([0.5, 2.0, 10.0]),
                "collect_seconds": chance.choice([None, 20.0, 60.0]),
                "evaluate_seconds": chance.choice([5.0, 60.0]),
                "idle_seconds": chance.choice([15.0, 60.0, 300.0]),
                "failed_rounds": chance.randint(1, 3),
            },
            "train": {"steps": 4},
            "pipeline": pipeline,
            "wire": {
                "element_type": chance.choice(["fp32", "bf16", "fp16"]),
                "max_update_norm": None if clipped else chance.choice([None, 50.0]),
            },
            "evaluate": {"every": chance.choice([0, 1, 2]), "base": chance.random() < 0.5},
        }
    )


def _disturb(script: Script, chance: random.Random, names: list[str]) -> None:
    def when() -> float:
        # Early more often than late: that is when most happens.
        return script.quiet_at * chance.random() ** 1.5

    everyone = ["server", "server", *names]
    for _ in range(chance.randint(0, 4)):
        how = chance.choice(["kill", "kill", "power"])
        script.faults.append(Fault(when(), how, chance.choice(everyone), chance.expovariate(1 / 8)))
    for _ in range(chance.randint(0, 6)):
        kind = chance.choice(["cut", "cut", "silence", "stall", "slow", "unreachable", "freeze", "full"])
        whom = chance.choice(everyone if kind in ("freeze", "full") else names)
        script.faults.append(Fault(when(), kind, whom, chance.expovariate(1 / 15)))
    for _ in range(chance.randint(0, 4)):
        whom = chance.choice(everyone)
        how = chance.choice(["kill", "power", "power", "full"])
        points = SERVER_POINTS if whom == "server" else SITE_POINTS
        if how == "full":
            points = tuple(point for point in points if point in DISK_POINTS)
        count = 1 + int(chance.expovariate(1 / 4))
        script.arms.append(Arm(whom, chance.choice(points), count, how))
    script.faults.sort(key=lambda fault: fault.at)


def _operate(script: Script, chance: random.Random, dispensable: list[str]) -> None:
    def when() -> float:
        return script.quiet_at * chance.random()

    if chance.random() < 0.25:
        at = when()
        script.orders += [(at, "pause", ""), (at + chance.expovariate(1 / 10), "resume", "")]
    if chance.random() < 0.05:
        script.orders.append((when(), "cancel", ""))
    if dispensable and chance.random() < 0.15:
        script.orders.append((when(), "revoke", chance.choice(dispensable)))
    script.orders.sort()
