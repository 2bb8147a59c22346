"""The phases of a run: Init once, then Recruit, Collect, Reduce, Evaluate, Commit in every round; Failed in between."""

from typing import Final

from fsllm_server.engine.phases.collect import Collect
from fsllm_server.engine.phases.commit import Commit
from fsllm_server.engine.phases.evaluate import Evaluate
from fsllm_server.engine.phases.failed import Failed
from fsllm_server.engine.phases.init import Init
from fsllm_server.engine.phases.phase import Phase
from fsllm_server.engine.phases.recruit import Recruit
from fsllm_server.engine.phases.reduce import Reduce

PHASES: Final[dict[str, Phase]] = {
    phase.name: phase for phase in (Init(), Recruit(), Collect(), Reduce(), Evaluate(), Commit(), Failed())
}

__all__ = ["PHASES", "Phase"]
