"""The site's privacy ledger: every noised release, on disk before it can leave.

One JSON object a line, appended and synced. A release is one noised delta, known by its digest: sending the same bytes
again costs nothing, other bytes for the same round are another release and are counted as one. So a crash between the
ledger and the upload never hides a release, and a retry never counts twice.

Gaussian mechanisms compose exactly: releases with noise multipliers z_i are as private as one release with multiplier
(sum 1/z_i^2)^(-1/2) (Dong, Roth, Su 2019, arXiv 1905.02383, corollary 2; the clip norm is part of z). The epsilon of
that one release is computed by opacus in the trainer's process.
"""

import json
import math
import os
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import NamedTuple

from fsllm_client.site.policy import PlanNoise
from fsllm_client.site.state import FILE_MODE
from fsllm_common.errors import FsllmError
from fsllm_common.failpoints import reach
from fsllm_common.files import disk_errors, sync_folder, write_all

Accountant = Callable[[float, int, float], Awaitable[float]]
"""(noise multiplier, releases, delta) -> epsilon."""


@dataclass(frozen=True, slots=True)
class Release:
    """One noised delta that left, or was about to."""

    at: str
    """UTC, ISO 8601."""
    run_id: str
    run_name: str
    round: int
    digest: str
    """Of the payload, 64 hexadecimal digits."""
    clip_norm: float
    multiplier: float
    delta: float
    epsilon: float
    """What the run has spent with this release, at its delta."""
    epsilon_total: float
    """What all runs of the site have spent with this release, at the policy's delta."""


class Spent(NamedTuple):
    """Epsilon after some releases."""

    run: float
    total: float


class Ledger:
    """The ledger file. One daemon appends; anyone at the site may read."""

    def __init__(self, path: Path) -> None:
        """Read the file; a line that a crash cut short was never promised to anyone and is cut off.

        Raises:
            FsllmError: STATE_CORRUPT, with the line.

        """
        self.path = path
        self.releases: list[Release] = []
        self._whole = 0
        try:
            raw = path.read_bytes()
        except FileNotFoundError:
            return
        for number, line in enumerate(raw.splitlines(keepends=True), 1):
            if not line.endswith(b"\n"):
                break
            self.releases.append(_parse(line, path, number))
            self._whole += len(line)

    def holds(self, run_id: str, round_: int, digest: str) -> bool:
        """Return whether this very release is recorded."""
        return any((r.run_id, r.round, r.digest) == (run_id, round_, digest) for r in self.releases)

    async def forecast(
        self, accountant: Accountant, run_id: str, noise: PlanNoise, *, releases: int, delta: float
    ) -> Spent:
        """Return the epsilons after so many further releases of a run.

        Args:
            accountant: Computes the epsilon of Gaussian releases.
            run_id: The run; its releases so far count.
            noise: The plan's.
            releases: How many more.
            delta: Of the total.

        """
        planned = [noise.multiplier] * releases
        of_run = [r.multiplier for r in self.releases if r.run_id == run_id]
        of_all = [r.multiplier for r in self.releases]
        run = await _epsilon(accountant, [*of_run, *planned], noise.delta)
        total = await _epsilon(accountant, [*of_all, *planned], delta)
        return Spent(run, total)

    def record(self, release: Release) -> None:
        """Append a release and sync it. Returns without a write when this very release is recorded.

        Raises:
            Unavailable: DISK_FULL.

        """
        if self.holds(release.run_id, release.round, release.digest):
            return
        line = json.dumps(asdict(release), separators=(",", ":"), allow_nan=False).encode() + b"\n"
        with disk_errors(self.path.parent):
            created = not self.path.exists()
            descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, FILE_MODE)
            try:
                os.ftruncate(descriptor, self._whole)
                write_all(descriptor, memoryview(line), self._whole)
                reach("ledger.sync")
                os.fsync(descriptor)
                reach("ledger.synced")
            finally:
                os.close(descriptor)
            if created:
                sync_folder(self.path.parent)
        self._whole += len(line)
        self.releases.append(release)


def combined_multiplier(multipliers: Iterable[float]) -> float:
    """Return the multiplier of the one Gaussian release that is as private as all of these together."""
    return 1.0 / math.sqrt(sum(z**-2 for z in multipliers))


async def _epsilon(accountant: Accountant, multipliers: list[float], delta: float) -> float:
    if not multipliers:
        return 0.0
    if len(set(multipliers)) == 1:
        return await accountant(multipliers[0], len(multipliers), delta)
    return await accountant(combined_multiplier(multipliers), 1, delta)


def _parse(line: bytes, path: Path, number: int) -> Release:
    try:
        raw = json.loads(line)
        return Release(**{field.name: raw[field.name] for field in fields(Release)})
    except (ValueError, KeyError, TypeError) as error:
        raise FsllmError("STATE_CORRUPT", f"{path} line {number} is no release") from error
