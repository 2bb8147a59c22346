"""The manifest of a committed round: what was added to what, with which weights, and what came of it.

A manifest is a JSON object in one canonical encoding (``encode``): keys sorted, no spaces, ASCII, each number in the
shortest form that reads back as the same float64. Its digest is the BLAKE3 of these bytes. Each names the digest of the
round before, so that the last digest of a run stands for all of its history. Keys::

    format      1
    run, plan   the run's id; BLAKE3 of its plan as submitted (canonical JSON)
    epoch       empty, or the name of the restoration from a back-up since which the run's history goes on from here
    round       0, 1, 2, ...; round r makes version r
    previous    the digest of round r - 1's manifest; null in round 0
    base        version, published, master, and parts and state where the version has any: what the updates were added
                to; null in round 0
    algorithm   the plan's section: name and parameters
    reducer     name and version of the arithmetic that added the updates up; package: of the algorithm, with its
                version, where it is not fsllm's own
    updates     in the order of the sum, each with member, digest, element_type (null when it was not recorded),
                payload_bytes, examples, tokens, steps, and weight, its share in the sum
    adapter_config  BLAKE3 of the adapter's configuration as the builder of version 0 sent it; null after round 0
    result      version, published, master, parts and state where the version has any, element_type, payload_bytes

``published`` is the digest of what the sites were given, ``master`` that of the same version in float32. A version that
is not one part named adapter has ``parts``: by name the two digests of each, of which the version's own are made
(fsllm.v1.Version). ``state`` holds the digests of the server's tensors by their names, e.g. of an optimizer's moments.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

from blake3 import blake3

from fsllm_common.errors import FsllmError

FORMAT: Final = 1

Body: TypeAlias = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Link:
    """One round of the chain: a manifest, and the digest that was recorded when the round was committed."""

    body: bytes
    recorded: str
    """Hexadecimal; empty when the round was committed by a version of fsllm that kept no manifests."""


def encode(manifest: Body) -> bytes:
    """Return the canonical encoding."""
    return json.dumps(manifest, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


def digest(body: bytes) -> str:
    """Return the digest of an encoded manifest, hexadecimal."""
    return blake3(body).hexdigest()


def decode(body: bytes) -> Body:
    """Return a manifest from its encoding.

    Raises:
        FsllmError: ROUND_BROKEN: it is not a manifest in its canonical encoding.

    """
    try:
        manifest = json.loads(body)
        if isinstance(manifest, dict) and manifest.get("format") == FORMAT and encode(manifest) == body:
            return manifest
    except (ValueError, RecursionError):
        pass
    raise FsllmError("ROUND_BROKEN", f"not a round's manifest of format {FORMAT} in its canonical encoding")


class ChainCheck:
    """Checks manifests one after the other, from round 0 on. Holds no more than the last one.

    It looks at nothing but the manifests: anybody who was given them can do the same.
    """

    def __init__(self) -> None:
        self._round = 0
        self._previous: Body | None = None
        self._before: str | None = None

    def check(self, link: Link) -> list[str]:
        """Return what is wrong with the next manifest and with its place in the chain."""
        problems: list[str] = []
        own = digest(link.body)
        if link.recorded and own != link.recorded:
            problems.append(f"the manifest's digest is {own[:12]}; {link.recorded[:12]} was recorded at the commit")
        try:
            manifest = decode(link.body)
        except FsllmError as error:
            problems.append(error.message)
            manifest = {}
        else:
            problems += _place(manifest, self._round, self._previous, self._before)
        self._round, self._previous, self._before = self._round + 1, manifest, link.recorded or own
        return problems


def check_chain(links: Iterable[Link]) -> list[list[str]]:
    """Return, for each round from 0 on, what is wrong with its manifest and with its place in the chain."""
    check = ChainCheck()
    return [check.check(link) for link in links]


def _place(manifest: Body, number: int, previous: Body | None, before: str | None) -> list[str]:
    """Return what does not fit between a manifest and the one before."""
    problems = []
    if manifest.get("round") != number:
        problems.append(f"it is of round {manifest.get('round')}, in the place of round {number}")
    if manifest.get("previous") != before:
        problems.append(f"it follows the manifest {_short(manifest.get('previous'))}; before it is {_short(before)}")
    if previous:
        problems += [
            f"its {key} is not that of round {number - 1}"
            for key in ("run", "plan")
            if manifest.get(key) != previous.get(key)
        ]
        base, result = manifest.get("base") or {}, previous.get("result") or {}
        if any(base.get(key) != result.get(key) for key in ("version", "published", "master", "parts", "state")):
            problems.append(f"its base is not the result of round {number - 1}")
    return problems


def _short(value: object) -> str:
    return str(value)[:12] if value else "none"
