"""Sites that rebuild the model from a few numbers send a digest of what they have: those of a round have to agree.

The model is what most of them have rebuilt. A site that has another one is out of the round, whether it comes first or
last: so one site, broken or lying, stops nobody else.
"""

from __future__ import annotations

from collections import defaultdict

from fsllm_common.errors import FsllmError
from fsllm_server.engine.phases.phase import names
from fsllm_server.engine.state import Run
from fsllm_server.engine.turn import Turn


def refuse_other_model(run: Run, round_: int, member: str, digest: str) -> None:
    """Refuse an update that starts from another model than more than half of the cohort have rebuilt already.

    Args:
        run: The run.
        round_: Its sites start from one version.
        member: Who sends the update.
        digest: Of the model that it has rebuilt, hexadecimal; empty of a method that rebuilds none.

    Raises:
        FsllmError: MODEL_DIGEST_MISMATCH.

    """
    for other, members in _groups(run, round_):
        if other != digest and 2 * len(members) > len(run.cohort):
            raise FsllmError("MODEL_DIGEST_MISMATCH", _differs(run, member, digest, members, other))


def drop_odd_ones_out(turn: Turn) -> bool:
    """Leave out the updates of sites that have rebuilt another model than most, and tell whether any was left out.

    Where no model has most of the sites, the run is paused without any of these updates: people have to look.
    """
    groups = _groups(turn.run, turn.run.round)
    if len(groups) < 2:
        return False
    (most, members), (_, others) = groups[:2]
    tie = len(members) == len(others)
    odd = [(name, digest) for digest, group in groups[0 if tie else 1 :] for name in group]
    for name, digest in odd:
        message = _differs(turn.run, name, digest, members, most)
        if name in turn.run.members:  # it may have been revoked since
            turn.update_member(name, message=f"train: {message}")
        turn.notify("rejected", name, f"an update of {name} is left out: {message}")
    dropped = {name for name, _ in odd}
    turn.update(updates={name: update for name, update in turn.run.updates.items() if name not in dropped})
    if tie:
        sides = "; ".join(f"{names(group)}: {_short(digest)}" for digest, group in groups)
        turn.pause(
            "MODEL_DIGEST_MISMATCH", f"the sites of round {turn.run.round} have rebuilt different models: {sides}"
        )
    return True


def _groups(run: Run, round_: int) -> list[tuple[str, list[str]]]:
    """Return (digest, members) of the updates of a round, the largest group first."""
    found = defaultdict(list)
    for name, update in sorted(run.updates.items()):
        if update.round == round_:
            found[update.model_digest].append(name)
    return sorted(found.items(), key=lambda group: (-len(group[1]), group[0]))


def _differs(run: Run, member: str, digest: str, most: list[str], theirs: str) -> str:
    return f"{member} has rebuilt the model {_short(digest)} in round {run.round}, {names(most)} {_short(theirs)}"


def _short(digest: str) -> str:
    return digest[:12] or "nothing"
