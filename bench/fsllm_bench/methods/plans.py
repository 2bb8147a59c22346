"""What each method needs besides its name, and which runs there are to measure, the most telling first."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any, Final, NamedTuple

from fsllm_bench.methods.attacks import ATTACKS, NONE
from fsllm_bench.methods.splits import MORE_SITES, SITES
from fsllm_common.algorithms import algorithm_class

Fragment = Mapping[str, Any]

BASE: Final[dict[str, Any]] = {
    "rounds": 3,
    "model": {"name": "embedded"},
    "adapter": {"kind": "lora", "rank": 8, "alpha": 16},
    "algorithm": {},
    "cohort": {"sites": list(SITES), "quorum": len(SITES)},
    "timing": {"gather_seconds": 0.1, "recruit_seconds": 300},
    "train": {"steps": 6, "batch_size": 4, "learning_rate": 0.01, "precision": "fp32"},
    "data": {"format": "instruction", "template": "brief", "max_length": 64},
    "wire": {"element_type": "fp32"},
    "evaluate": {"metrics": ["loss", "exact_match"], "limit": 36, "max_new_tokens": 8},
}
"""Measured before the first round and after the last one."""

_FROZEN: Final[dict[str, Any]] = {"algorithm": {"parameters": {"freeze_a": True}}}
_SGD: Final[Fragment] = {"train": {"optimizer": "sgd", "learning_rate": 1.0, "max_grad_norm": 0}}
_MORE_SGD: Final[Fragment] = {"train": {**_SGD["train"], "steps": 18, "learning_rate": 0.15}}
_ZEROTH: Final[Fragment] = {
    "adapter": {"kind": "ia3"},
    "train": {**_SGD["train"], "steps": 30, "learning_rate": 0.1},
}
_SEVEN: Final[dict[str, Any]] = {"cohort": {"sites": [*SITES, *MORE_SITES], "quorum": 7}}
_PAIRS: Final[Fragment] = {
    "data": {"format": "preference", "packing": False},
    "evaluate": {"metrics": ["loss", "reward_accuracy"]},
}

METHODS: Final[Mapping[str, Fragment]] = {
    "fedavg": {},
    "fedavgm": {},
    "fedadam": {},
    "fedyogi": {},
    "fedadagrad": {},
    "fedprox": {},
    "scaffold": {},
    # Plain SGD gets less far than AdamW in as many steps.
    "fednova": _MORE_SGD,
    # A version of every two updates, and of each: as many as make about the same work for five sites.
    "fedbuff": {"rounds": 7, "algorithm": {"name": "fedavg"}, "cohort": {"quorum": 2, "buffer": {"size": 2}}},
    "fedasync": {
        "rounds": 15,
        "algorithm": {"name": "fedavg", "server_learning_rate": 0.4},
        "cohort": {"quorum": 1, "buffer": {"size": 1}},
    },
    "fedit": {},
    "ffa-lora": {},
    "fedsa-lora": {},
    "rolora": {},
    "flora": {},
    "flexlora": {},
    "hlora": {},
    "hetlora": {},
    "fedex-lora": {},
    "lora-fair": {},
    "rac-lora": {},
    # A step takes two rounds; sites train in every other one.
    "fedask": {"rounds": 6},
    "fed-sb": {"adapter": {"kind": "lora-xs"}, "train": {"learning_rate": 0.05}},
    "median": _FROZEN,
    "trimmed-mean": _FROZEN,
    "krum": _FROZEN,
    "multi-krum": _FROZEN,
    "bulyan": {**_FROZEN, **_SEVEN},
    "norm-bound": _FROZEN,
    "geometric-median": _FROZEN,
    "centred-clipping": _FROZEN,
    "fltrust": _FROZEN,
    "ditto": {},
    # w's step is pull x rate of the way to theta, and theta's is only stable where pull x its rate is small.
    "pfedme": {
        "train": {**_SGD["train"], "learning_rate": 0.5},
        "algorithm": {"parameters": {"pull": 1.0, "inner_learning_rate": 0.1}},
    },
    "fedrep": {},
    "fedper": {},
    "apfl": _MORE_SGD,
    "fedalt": {},
    "fdlora": {},
    # Steps along random directions are poor ones: more of them, in a much smaller space.
    "fedkseed": _ZEROTH,
    "fedkseed-pro": {**_ZEROTH, "algorithm": {"name": "fedkseed", "parameters": {"draw": "amplitude"}}},
    "fedmezo": _ZEROTH,
    "ferret": {"algorithm": {"parameters": {"coordinates": 8192}, "server_learning_rate": 0.2}},
    "fedex": {"algorithm": {"parameters": {"learning_rates": "0.5,1,2"}}},
    "dpo": _PAIRS,
}
"""Sections that are laid over ``BASE``, by the method's name in the table: ``algorithm.name``, unless they say more."""

UNMEASURED: Final = frozenset({"noop"})
"""Installed, and trains nothing."""

ATTACKED: Final = (
    "fedavg",
    "ffa-lora",
    "median",
    "trimmed-mean",
    "krum",
    "multi-krum",
    "bulyan",
    "norm-bound",
    "geometric-median",
    "centred-clipping",
    "fltrust",
)
"""Two that are not robust, for comparison (the second with a frozen A, like the rules), and the robust rules."""

ATTACK_SPLIT: Final = "iid"
"""Where sites differ, an honest update looks like a bad one: the rules promise nothing there."""


class Cell(NamedTuple):
    """One run."""

    method: str
    split: str
    seed: int
    attack: str = NONE

    @property
    def name(self) -> str:
        """Of its plan; the attacking site reads its part from it."""
        return f"{self.method}--{self.split}-{self.seed}--{self.attack}"


def make_plan(cell: Cell) -> dict[str, Any]:
    """Return the plan of a run."""
    fragment = METHODS[cell.method]
    plan: dict[str, Any] = {"name": cell.name, "seed": cell.seed, **BASE}
    plan |= {key: {**BASE[key], **value} if isinstance(value, dict) else value for key, value in fragment.items()}
    plan["algorithm"] = {"name": cell.method, **plan["algorithm"]}
    plan["evaluate"] = {**plan["evaluate"], "every": plan["rounds"]}
    return plan


def digest(cell: Cell) -> str:
    """Return what tells a result of this plan from one of another."""
    return hashlib.blake2b(json.dumps(make_plan(cell), sort_keys=True).encode(), digest_size=8).hexdigest()


def cells(
    methods: Iterable[str], seeds: Sequence[int], splits: Sequence[str], attacks: Sequence[str] = tuple(ATTACKS)
) -> list[Cell]:
    """Return the runs in order: the first seed and split, its attacks, its other splits, other seeds, their attacks."""
    methods = list(methods)
    clean = [Cell(method, split, seed) for seed in seeds for split in splits for method in methods]
    attacked = [
        [
            Cell(method, ATTACK_SPLIT, seed, attack)
            for method in methods
            if method in ATTACKED and ATTACK_SPLIT in splits
            for attack in (NONE, *attacks)
        ]
        for seed in seeds
    ]
    first = len(methods)
    return list(dict.fromkeys([*clean[:first], *attacked[0], *clean[first:], *chain.from_iterable(attacked[1:])]))


def trusting() -> list[str]:
    """Return the algorithms that compare updates with a trusted one."""
    return [name for name in algorithms() if algorithm_class(name).needs_trusted]


def algorithms() -> list[str]:
    """Return the algorithms that the table has, once each."""
    return list(dict.fromkeys(fragment.get("algorithm", {}).get("name", name) for name, fragment in METHODS.items()))
