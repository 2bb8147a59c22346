"""Verifying committed rounds: a right run, an independent recomputation, and every kind of change, found and named."""

import asyncio
import contextlib
import json
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from blake3 import blake3
from engine_harness import Member, Server, make_plan, serving

from fsllm.v1 import control_pb2
from fsllm.v1.tensors_pb2 import Manifest
from fsllm_common.errors import FsllmError
from fsllm_common.round_manifest import decode
from fsllm_server.engine.retention import Retention
from fsllm_server.reduce import VERSIONS

RECOMPUTED = control_pb2.ROUND_VERDICT_RECOMPUTED
CHAIN_ONLY = control_pb2.ROUND_VERDICT_CHAIN_ONLY
BROKEN = control_pb2.ROUND_VERDICT_BROKEN
EVERYTHING = Retention(rounds=100)


async def three_rounds(server: Server, **plan: Any) -> str:  # noqa: ANN401
    for name, value, examples in (("a", 0.1, 1), ("b", 0.7, 2), ("c", -0.3, 4)):
        Member(server, name, value=value, examples=examples).attach()
    plan = {"wire": {"element_type": "bf16"}, "cohort": {"quorum": 3}, **plan}
    run = await server.engine.submit(make_plan(**plan), "r1")
    await server.done(run)
    return run


async def findings(server: Server, run: str, round_: int | None = None) -> list[control_pb2.RoundFinding]:
    async with contextlib.aclosing(server.engine.verify(run, round_)) as told:
        return [one.finding async for one in told if one.HasField("finding")]


async def broken(server: Server, run: str) -> dict[int, str]:
    """Return the problems of the broken rounds."""
    return {f.manifest.round: "; ".join(f.problems) for f in await findings(server, run) if f.verdict == BROKEN}


def flip(path: Path, at: int = -1, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << bit
    path.write_bytes(data)


async def test_a_right_run_is_recomputed(tmp_path: Path) -> None:
    async with serving(tmp_path, EVERYTHING) as server:
        run = await three_rounds(server)
        found = await findings(server, run)
        assert [(f.manifest.round, f.verdict, list(f.problems), f.note) for f in found] == [
            (round_, RECOMPUTED, [], "") for round_ in range(4)
        ]
        assert [f.manifest.digest for f in found] == [c.manifest_digest for c in server.engine.get_run(run).commits]
        assert [f.manifest.round for f in await findings(server, run, 2)] == [2]
        with pytest.raises(FsllmError) as unknown:
            await findings(server, run, 4)
        assert unknown.value.reason == "VERSION_UNKNOWN"
        # The same after a restart; and verifying has changed nothing on disk.
        await server.restart()
        assert [f.verdict for f in await findings(server, run)] == [RECOMPUTED] * 4


def load(folder: Path, digest: str, dtype: Any) -> Any:  # noqa: ANN401
    return np.frombuffer((folder / digest / "payload").read_bytes(), dtype).astype(np.float32)


def named(manifest: Path, payload: bytes) -> str:
    """Compute a payload's digest from the definition in tensors.proto."""
    words = {1: "f32", 2: "f16", 3: "bf16"}
    text = "".join(
        f"{t.name}\t{words[t.element_type]}\t{','.join(map(str, t.shape))}\t{t.role}\n"
        for t in Manifest.FromString(manifest.read_bytes()).tensors
    )
    return blake3(text.encode() + b"\n" + payload).hexdigest()


@pytest.mark.parametrize(("word", "dtype"), [("fp32", np.float32), ("bf16", ml_dtypes.bfloat16), ("fp16", np.float16)])
async def test_anybody_can_recompute_a_round_from_its_manifest(tmp_path: Path, word: str, dtype: Any) -> None:  # noqa: ANN401
    """Nothing of the reducer: plain numpy over whole arrays, by the manifest alone."""
    rate = 0.9
    async with serving(tmp_path, EVERYTHING) as server:
        algorithm = {"name": "noop", "weighting": "examples", "server_learning_rate": rate}
        run = await three_rounds(server, wire={"element_type": word}, algorithm=algorithm)
        manifests = [decode(one.body) for one in server.engine.manifests(run)]
    for manifest in manifests[1:]:
        total = np.zeros(64, np.float32)
        examples = sum(update["examples"] for update in manifest["updates"])
        for update in manifest["updates"]:
            spool = tmp_path / "spools" / run / str(manifest["round"]) / update["member"] / update["digest"]
            assert named(spool.with_suffix(".manifest"), spool.read_bytes()) == update["digest"]
            assert update["weight"] == update["examples"] / examples
            delta = np.frombuffer(spool.read_bytes(), dtype).astype(np.float32)
            total = total + np.float32(update["weight"]) * delta
        base = load(tmp_path / "blobs", manifest["base"]["master"], np.float32)
        master = base + np.float32(manifest["algorithm"]["server_learning_rate"]) * total
        result = manifest["result"]
        assert named(tmp_path / "blobs" / result["master"] / "manifest", master.tobytes()) == result["master"]
        published = master.astype(dtype).tobytes()
        assert named(tmp_path / "blobs" / result["published"] / "manifest", published) == result["published"]


async def test_without_uploads_the_chain_is_checked(tmp_path: Path) -> None:
    async with serving(tmp_path, Retention(rounds=1)) as server:
        run = await three_rounds(server)
        await server.restart()
        found = await findings(server, run)
        assert [f.verdict for f in found] == [CHAIN_ONLY] * 3 + [RECOMPUTED]
        assert found[0].note == "its uploads are not kept any more"
        flip(tmp_path / "blobs" / decode(found[1].manifest.body)["result"]["published"] / "payload")
        assert list(await broken(server, run)) == [1]


@pytest.mark.parametrize("bit", [0, 4, 7])
@pytest.mark.parametrize("at", [0, 63, -1])
async def test_one_bit_of_a_kept_upload(tmp_path: Path, at: int, bit: int) -> None:
    async with serving(tmp_path, EVERYTHING) as server:
        run = await three_rounds(server)
        (payload,) = (p for p in (tmp_path / "spools" / run / "2" / "b").iterdir() if not p.suffix)
        flip(payload, at, bit)
        found = await broken(server, run)
        assert list(found) == [2]
        assert found[2].startswith("the upload of b: its digest is ")


async def test_every_bit_of_an_uploads_manifest(tmp_path: Path) -> None:
    async with serving(tmp_path, EVERYTHING) as server:
        run = await three_rounds(server)
        (manifest,) = (tmp_path / "spools" / run / "1" / "c").glob("*.manifest")
        original = manifest.read_bytes()
        for at in range(0, len(original) * 8, 37):
            flip(manifest, at // 8, at % 8)
            (found,) = await findings(server, run, 1)
            assert found.verdict == BROKEN, f"bit {at}"
            assert "the upload of c: " in found.problems[0]
            manifest.write_bytes(original)


@pytest.mark.parametrize("which", ["published", "master"])
@pytest.mark.parametrize("file", ["payload", "manifest"])
async def test_one_bit_of_a_version(tmp_path: Path, which: str, file: str) -> None:
    async with serving(tmp_path, EVERYTHING) as server:
        run = await three_rounds(server)
        digest = decode(list(server.engine.manifests(run))[1].body)["result"][which]
        flip(tmp_path / "blobs" / digest / file, 9)
        found = await broken(server, run)
        assert f"version {digest[:12]} on disk: " in found[1]
        # What starts from a broken master can not be recomputed either.
        assert list(found) == ([1, 2] if which == "master" else [1])


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: path.unlink(), "the upload of a is missing"),
        (lambda path: path.write_bytes(path.read_bytes()[:-4]), "the upload of a: it has 124 bytes instead of 128"),
        (lambda path: path.write_bytes(path.read_bytes() + b"x"), "the upload of a: it has 129 bytes instead of 128"),
    ],
)
async def test_uploads_that_are_lost_shorter_or_longer(
    tmp_path: Path, damage: Callable[[Path], object], words: str
) -> None:
    async with serving(tmp_path, EVERYTHING) as server:
        run = await three_rounds(server)
        (payload,) = (p for p in (tmp_path / "spools" / run / "3" / "a").iterdir() if not p.suffix)
        damage(payload)
        assert await broken(server, run) == {3: words}


async def test_rounds_of_an_earlier_arithmetic_are_not_held_against_the_present_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving(tmp_path, EVERYTHING) as server:
        run = await three_rounds(server)
        monkeypatch.setitem(VERSIONS, "sum", 2)
        found = await findings(server, run)
        note = "its uploads are kept, but it was made by sum 1; this fsllm has sum 2"
        assert [(f.verdict, list(f.problems), f.note) for f in found] == [(CHAIN_ONLY, [], note)] * 4
        # What is made from now on says so, and is recomputed.
        later = await server.engine.submit(make_plan(cohort={"quorum": 3}, rounds=1), "r2")
        await server.done(later)
        assert [f.verdict for f in await findings(server, later)] == [RECOMPUTED] * 2
        reducers = [decode(one.body)["reducer"] for one in server.engine.manifests(later)]
        assert reducers == [{"name": "sum", "version": 2}] * 2


def change(folder: Path, kind: str, count: int, edit: Callable[[Any], None]) -> None:
    """Edit the body of the count-th event of a kind, as somebody with access to the database would."""
    with contextlib.closing(sqlite3.connect(folder / "db.sqlite3")) as database, database:
        query = "SELECT sequence, body FROM events WHERE kind = ? ORDER BY sequence LIMIT 1 OFFSET ?"
        sequence, body = database.execute(query, (kind, count)).fetchone()
        event = json.loads(body)
        edit(event)
        database.execute("UPDATE events SET body = ? WHERE sequence = ?", (json.dumps(event), sequence))


def next_float(event: Any) -> None:  # noqa: ANN401
    event["weights"][1][1] = float(np.nextafter(event["weights"][1][1], 1))


@pytest.mark.parametrize("rounds", [100, 0])
@pytest.mark.parametrize(
    ("kind", "count", "edit", "words"),
    [
        ("reduced", 2, next_float, "updates"),
        ("reduced", 2, lambda e: e["parts"][0].update(digest="0" * 64), "result"),
        ("update", 5, lambda e: e.update(examples=e["examples"] + 1), "updates"),
        ("update", 5, lambda e: e.update(digest="0" * 64), "updates"),
    ],
)
async def test_a_change_in_the_database(
    tmp_path: Path, rounds: int, kind: str, count: int, edit: Callable[[Any], None], words: str
) -> None:
    async with serving(tmp_path, Retention(rounds=rounds)) as server:
        run = await three_rounds(server)
        change(tmp_path, kind, count, edit)
        # Found under the running server, which knows what it was ...
        live = await broken(server, run)
        assert 2 in live
        assert f"the log in the database was changed since the server read or wrote it: {words}" in live[2]
        # ... and by one that has read nothing else.
        await server.restart()
        later = await broken(server, run)
        assert 2 in later
        assert "was recorded at the commit" in later[2]
        assert not {0, 1} & {*live, *later}


async def test_a_changed_weight_is_named_by_recomputing(tmp_path: Path) -> None:
    async with serving(tmp_path, EVERYTHING) as server:
        run = await three_rounds(server)
        change(tmp_path, "reduced", 2, next_float)
        await server.restart()
        found = await broken(server, run)
        assert list(found) == [2]
        assert f"the algorithm gives {1 / 7!r}, {2 / 7!r}, {4 / 7!r}" in found[2]


async def test_a_changed_digest_of_a_manifest(tmp_path: Path) -> None:
    async with serving(tmp_path, EVERYTHING) as server:
        run = await three_rounds(server)
        with contextlib.closing(sqlite3.connect(tmp_path / "db.sqlite3")) as database, database:
            digest = list(server.engine.manifests(run))[3].digest.hex()
            changed = f"{int(digest, 16) ^ 1:064x}"
            database.execute("UPDATE events SET manifest = ? WHERE manifest = ?", (changed, digest))
        found = await broken(server, run)
        assert list(found) == [3]
        assert f"{digest[:12]}" in found[3]


async def test_a_log_that_can_not_be_replayed_any_more(tmp_path: Path) -> None:
    async with serving(tmp_path, EVERYTHING) as server:
        run = await three_rounds(server)
        change(tmp_path, "update", 4, lambda event: event.update(member="nobody"))
        found = await broken(server, run)
        assert {2, 3} <= found.keys()
        assert "entry " in found[3]
        with pytest.raises(FsllmError) as refused:
            await server.restart()
        assert refused.value.reason == "STATE_CORRUPT"
        assert "entry " in refused.value.message
        server.open()  # for the end of the test


async def test_verifying_goes_on_beside_a_round_and_can_be_broken_off(tmp_path: Path) -> None:
    async with serving(tmp_path, EVERYTHING) as server:
        first = await three_rounds(server)
        run = await server.engine.submit(make_plan(cohort={"quorum": 3}, rounds=2), "r2")
        told = server.engine.verify(first, None)
        assert (await anext(told)).HasField("progress")
        await told.aclose()
        both = await asyncio.gather(findings(server, first), findings(server, first))
        assert [[f.verdict for f in one] for one in both] == [[RECOMPUTED] * 4] * 2
        await server.done(run)
        progress = [one.progress async for one in server.engine.verify(run, None) if one.HasField("progress")]
        assert [p.done_bytes for p in progress] == sorted(p.done_bytes for p in progress)
        assert {p.round for p in progress} == {0, 1, 2}
        assert progress[-1].total_bytes > 0


async def test_the_servers_state_is_kept_with_each_version_and_recomputed(tmp_path: Path) -> None:
    plan: dict[str, Any] = {"algorithm": {"name": "fedavgm"}, "wire": {"element_type": "fp32"}}
    async with serving(tmp_path, EVERYTHING) as server:
        run = await three_rounds(server, **plan)
        found = await findings(server, run)
        assert [(f.verdict, list(f.problems)) for f in found] == [(RECOMPUTED, [])] * 4
        told = [decode(f.manifest.body) for f in found]
        assert ["state" in one["result"] for one in told] == [False, True, True, True]
        assert [one["base"].get("state") for one in told[1:]] == [one["result"].get("state") for one in told[:-1]]
        # Examples weigh 1, 2 and 4; each round's momentum is 0.9 of the last one's and the mean delta.
        mean = (0.1 * 1 + 0.7 * 2 - 0.3 * 4) / 7
        velocity = np.frombuffer((blob(tmp_path, told[3]["result"]["state"]["velocity"])).read_bytes(), "<f4")
        np.testing.assert_allclose(velocity, mean * (1 + 0.9 + 0.81), rtol=1e-5)
        last = np.frombuffer(blob(tmp_path, told[3]["result"]["master"]).read_bytes(), "<f4")
        np.testing.assert_allclose(last, mean * (1 + 1.9 + 2.71), rtol=1e-5)
        flip(blob(tmp_path, told[2]["result"]["state"]["velocity"]))
        wrong = await broken(server, run)
        assert sorted(wrong) == [2, 3]
        assert "its base" in wrong[3]


def blob(folder: Path, digest: str) -> Path:
    return folder / "blobs" / digest / "payload"
