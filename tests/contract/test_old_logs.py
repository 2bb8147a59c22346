"""A server that is upgraded decides upon the log of a run in progress as the one that has written it did."""

import json
from collections import Counter

import pytest
from tests.contract.old_logs import FOLDER, decided, read, told

from fsllm_server.engine.effects import SweepSpools
from fsllm_server.engine.rules import FIRST, LATEST

CURE = (
    "what is decided has changed: runs in progress would go on from a state that their members do not know. Make it "
    "the next version in fsllm_server/engine/rules.py, ask for it where it is decided, and record its logs with "
    "`python tests/contract/old_logs.py`"
)


@pytest.mark.parametrize("rules", range(FIRST, LATEST + 1))
def test_a_log_gives_what_was_decided_when_it_was_recorded(rules: int) -> None:
    logs = read(FOLDER / f"rules-{rules}.jsonl.gz")
    for log in logs:
        assert json.loads(log[0].body).get("rules", FIRST) == rules
        for number, (then, now) in enumerate(zip(log, decided([entry.body for entry in log]), strict=True)):
            assert now == then, f"entry {number} ({json.loads(then.body)['kind']}): {CURE}"
    kinds = Counter(json.loads(entry.body)["kind"] for log in logs for entry in log)
    assert {"update", "reduced", "answered", "deadline", "restarted", "paused", "detached", "idle"} <= kinds.keys()


def test_another_decision_is_seen() -> None:
    assert told([SweepSpools()]) != told([])
