"""Rounds' manifests: the chain that anybody can check, and what a changed log, weight or manifest looks like."""

import json
import sqlite3
import struct
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3
from engine_harness import Member, Server, make_plan, serving
from hypothesis import given
from hypothesis import strategies as st

from fsllm_common.errors import FsllmError
from fsllm_common.round_manifest import FORMAT, Link, check_chain, decode, digest, encode


def chain(length: int) -> list[dict[str, Any]]:
    manifests: list[dict[str, Any]] = []
    previous = None
    for number in range(length):
        result = {"version": number, "published": f"{number:064}", "master": f"{number:064}"}
        base = {key: manifests[-1]["result"][key] for key in result} if manifests else None
        manifests.append(
            {"format": FORMAT, "run": "r", "plan": "p", "round": number, "previous": previous}
            | {"base": base, "result": result, "updates": [{"member": "a", "weight": 1 / 3}]}
        )
        previous = digest(encode(manifests[-1]))
    return manifests


def links(manifests: list[dict[str, Any]]) -> list[Link]:
    return [Link(encode(manifest), digest(encode(manifest))) for manifest in manifests]


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_weights_come_back_to_the_last_bit(weight: float) -> None:
    body = encode({"format": FORMAT, "weight": weight})
    assert struct.pack("<d", decode(body)["weight"]) == struct.pack("<d", weight)


def test_the_encoding_is_what_the_documentation_says() -> None:
    body = encode({"format": 1, "b": [0.1, 1e300], "a": "ü"})
    assert body == b'{"a":"\\u00fc","b":[0.1,1e+300],"format":1}'
    assert digest(body) == blake3(body).hexdigest()


def test_a_right_chain_has_no_problem() -> None:
    assert check_chain(links(chain(4))) == [[], [], [], []]
    assert check_chain([]) == []


@pytest.mark.parametrize("round_", [0, 1, 3])
def test_any_flipped_bit_of_any_manifest_is_found(round_: int) -> None:
    good = links(chain(4))
    body = good[round_].body
    for at in range(0, len(body) * 8, 7):
        flipped = bytearray(body)
        flipped[at // 8] ^= 1 << at % 8
        bad = [*good]
        bad[round_] = Link(bytes(flipped), good[round_].recorded)
        assert next(i for i, problems in enumerate(check_chain(bad)) if problems) == round_


def test_a_changed_round_whose_digests_are_mended_breaks_the_next() -> None:
    manifests = chain(3)
    manifests[1]["updates"][0]["weight"] = 0.5
    assert [bool(problems) for problems in check_chain(links(manifests))] == [False, False, True]


def test_rounds_that_are_left_out_swapped_or_of_another_run_are_found() -> None:
    good = links(chain(4))
    assert check_chain([good[0], good[2], good[3]])[1]
    assert check_chain([good[0], good[2], good[1], good[3]])[1]
    other = chain(2)
    other[1]["run"] = "another"
    assert check_chain(links(other))[1] == ["its run is not that of round 0"]
    moved = chain(2)
    moved[1]["base"]["master"] = "f" * 64
    assert check_chain(links(moved))[1] == ["its base is not the result of round 0"]


def test_rounds_without_a_recorded_digest_are_held_by_their_successors() -> None:
    manifests = chain(3)
    old = [Link(encode(manifest), "") for manifest in manifests[:2]]
    assert check_chain([*old, *links(manifests)[2:]]) == [[], [], []]
    manifests[1]["updates"][0]["weight"] = 0.5
    assert check_chain([old[0], Link(encode(manifests[1]), ""), *links(chain(3))[2:]])[2]


def test_another_encoding_of_the_same_is_none() -> None:
    with pytest.raises(FsllmError) as error:
        decode(json.dumps({"format": FORMAT}, indent=1).encode())
    assert error.value.reason == "ROUND_BROKEN"


async def run_of_three_rounds(server: Server) -> str:
    Member(server, "a", value=1, examples=1).attach()
    Member(server, "b", value=4, examples=2).attach()
    run = await server.engine.submit(make_plan(wire={"element_type": "bf16"}), "r1")
    await server.done(run)
    return run


async def test_the_manifests_of_a_run_say_what_was_done(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        run = await run_of_three_rounds(server)
        shown = server.engine.get_run(run)
        sent = list(server.engine.manifests(run))
        assert check_chain([Link(one.body, one.digest.hex()) for one in sent]) == [[]] * 4
        assert [one.digest for one in sent] == [commit.manifest_digest for commit in shown.commits]
        zero, *rounds = [json.loads(one.body) for one in sent]
        assert (zero["base"], zero["previous"], zero["round"]) == (None, None, 0)
        assert [update["weight"] for update in zero["updates"]] == [1.0]
        for manifest, commit in zip(rounds, shown.commits[1:], strict=True):
            assert manifest["run"] == run
            assert manifest["plan"] == blake3(shown.plan).hexdigest()
            assert manifest["algorithm"]["name"] == "noop"
            assert manifest["algorithm"]["weighting"] == "examples"
            assert manifest["reducer"] == {"name": "sum", "version": 1}
            assert manifest["result"]["published"] == commit.version.digest.hex()
            assert manifest["result"]["master"] != manifest["result"]["published"]
            assert manifest["result"]["element_type"] == "bf16"
            for update, contribution in zip(manifest["updates"], commit.contributions, strict=True):
                assert update["element_type"] == "bf16"
                assert (update["member"], update["digest"]) == (contribution.member, contribution.digest.hex())
                assert (update["examples"], update["weight"]) == (contribution.examples, contribution.weight)
        assert [update["weight"] for update in rounds[0]["updates"]] == [1 / 3, 2 / 3]
        # A restart reads the same from the log.
        await server.restart()
        assert list(server.engine.manifests(run)) == sent


async def test_a_weight_that_is_changed_in_the_database_no_longer_has_its_digest(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        run = await run_of_three_rounds(server)
    with sqlite3.connect(tmp_path / "db.sqlite3") as database:
        sequence, body = database.execute(
            "SELECT sequence, body FROM events WHERE kind = 'reduced' ORDER BY sequence LIMIT 1 OFFSET 2"
        ).fetchone()
        event = json.loads(body)
        event["weights"][0][1] = 0.25
        database.execute("UPDATE events SET body = ? WHERE sequence = ?", (json.dumps(event), sequence))
    database.close()
    async with serving(tmp_path) as server:
        sent = list(server.engine.manifests(run))
        found = check_chain([Link(one.body, one.digest.hex()) for one in sent])
        assert [bool(problems) for problems in found] == [False, False, True, False]
