"""The manifest of a committed round, derived from the run's state and so from its log: the two can never disagree.

Its digest is also recorded beside the event that committed the round (``Entry.manifest``). So a log that was changed
afterwards, by a failing disk or by somebody, no longer gives the digests that stand in it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

from blake3 import blake3

from fsllm_common import round_manifest
from fsllm_common.algorithms import ADAPTER
from fsllm_common.round_manifest import Link
from fsllm_server.engine.state import Commit, Run, Version


def manifest_of(run: Run, commit: Commit, previous: str | None) -> bytes:
    """Return the encoded manifest of a round. Pure.

    Args:
        run: It has committed the rounds before.
        commit: The round.
        previous: The digest of the manifest of the round before; None in round 0.

    """
    before = run.commits[commit.round - 1] if commit.round else None
    plan = json.loads(run.source)
    return round_manifest.encode(
        {
            "format": round_manifest.FORMAT,
            "run": run.id,
            "plan": blake3(run.source.encode()).hexdigest(),
            "epoch": commit.epoch,
            "round": commit.round,
            "previous": previous,
            "base": _version(before.version) if before is not None else None,
            "algorithm": plan["algorithm"],
            "reducer": _reducer(commit.version),
            "updates": [
                {
                    "member": one.update.member,
                    "digest": one.update.digest,
                    "element_type": one.update.element_type or None,
                    "payload_bytes": one.update.payload_bytes,
                    "examples": one.update.examples,
                    "tokens": one.update.tokens,
                    "steps": one.update.steps,
                    "weight": one.weight,
                }
                for one in commit.contributions
            ],
            "adapter_config": None if commit.round else blake3(run.adapter_config.encode()).hexdigest(),
            "result": {
                **_version(commit.version),
                "element_type": plan["wire"]["element_type"],
                "payload_bytes": commit.version.payload_bytes,
            },
        }
    )


def committed(before: Run | None, after: Run) -> Commit | None:
    """Return the round that the event between these two states has committed, if it has: at most one."""
    return after.commits[-1] if len(after.commits) > (len(before.commits) if before is not None else 0) else None


def links(run: Run, recorded: Sequence[str]) -> Iterator[Link]:
    """Yield the chain of a run's manifests: each as the log gives it, with the digest that was recorded of it.

    Args:
        run: Its state.
        recorded: One a committed round; empty where the log holds none.

    """
    previous: str | None = None
    for commit, digest in zip(run.commits, recorded, strict=True):
        body = manifest_of(run, commit, previous)
        yield Link(body, digest)
        # What was recorded, so that a manifest that was changed does not make all that follow look changed.
        previous = digest or commit.manifest


def _reducer(version: Version) -> dict[str, object]:
    package = {"package": version.package} if version.package else {}
    return {"name": version.reducer, "version": version.reducer_version, **package}


def _version(version: Version) -> dict[str, object]:
    said: dict[str, object] = {"version": version.number, "published": version.digest, "master": version.master}
    if [part.name for part in version.parts] != [ADAPTER]:
        said["parts"] = {part.name: [part.digest, part.master] for part in version.parts}
    if version.state:
        said["state"] = dict(version.state)
    return said
