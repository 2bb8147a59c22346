"""How long uploads outlive the commit of their round, so that the round can be recomputed from them."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from typing import Final

from fsllm_server.engine.state import Run


class _Everything:
    """Contains whatever is asked for."""

    def __contains__(self, item: object) -> bool:
        return True


ALL: Final[Container[str]] = _Everything()


@dataclass(frozen=True, slots=True)
class Retention:
    """An upload is kept while both are met: its round is of the last ``rounds``, and younger than ``seconds``."""

    rounds: int = 3
    """Of each run, the last ones committed."""
    seconds: float = 7 * 86_400
    """Since the commit."""

    def keeps(self, run: Run | None, round_: int, now: float) -> Container[str]:
        """Return the members whose uploads for a round stay on disk. Pure.

        Args:
            run: Its state; None: nobody knows it.
            round_: The round in progress, or one committed: of the latter only what was counted is kept.
            now: Seconds since the epoch.

        """
        if run is None:
            return ()
        if round_ >= len(run.commits):
            return () if run.status.ended else ALL
        kept = (
            [commit for commit in run.commits[-self.rounds :] if now - commit.at < self.seconds] if self.rounds else []
        )
        counted = [contribution.update for commit in kept for contribution in commit.contributions]
        # Asynchronous updates are counted in later rounds than theirs.
        waiting = [*run.updates.values(), *run.early.values()]
        members = {update.member for update in (*counted, *waiting) if update.round == round_}
        return members | {order.member for order in run.orders.values() if order.round == round_}
