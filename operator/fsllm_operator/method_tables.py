"""The tables of docs/algorithms.md: what each method is, what travels, and what it goes with, all asked of the code.

Where a method's own word is not enough (which adapters, with noise, asynchronously), a plan is made and checked: the
tables say yes where ``fsllm plan check`` would.
"""

import inspect
import re
import typing
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import cache
from itertools import groupby
from typing import Any, Final

from fsllm.v1.tensors_pb2 import (
    TENSOR_ROLE_BASIS,
    TENSOR_ROLE_CONTROL,
    TENSOR_ROLE_CORANGE,
    TENSOR_ROLE_LORA_A,
    TENSOR_ROLE_LORA_B,
    TENSOR_ROLE_LORA_R,
    TENSOR_ROLE_MAGNITUDE,
    TENSOR_ROLE_RANGE,
    TENSOR_ROLE_SCALAR,
    TENSOR_ROLE_TEST_MATRIX,
    TensorRole,
)
from fsllm_common.algorithms import Algorithm, LocalRule, algorithm_class, algorithm_names, changes
from fsllm_common.algorithms.layers import Layer, LayerUpdate, module_and_key
from fsllm_common.plan.combinations import REFUSED
from fsllm_common.plan.schema import AdapterKind, Plan
from fsllm_common.tensors.manifest import role_of

Method: typing.TypeAlias = type[Algorithm]
Keys: typing.TypeAlias = Mapping[str, Any]

_RANK: Final = 4
_LAYER: Final = "model.layer.q_proj"
_SHAPES: Final[dict[str, dict[str, tuple[int, ...]]]] = {
    "lora": {"lora_A": (_RANK, 32), "lora_B": (32, _RANK)},
    "lora-xs": {"lora_A": (_RANK, 32), "lora_B": (32, _RANK), "lora_R": (_RANK, _RANK)},
}
"""Of one adapted layer."""

_WORDS: Final[dict[TensorRole.ValueType, str]] = {
    TENSOR_ROLE_LORA_A: "A",
    TENSOR_ROLE_LORA_B: "B",
    TENSOR_ROLE_LORA_R: "R",
    TENSOR_ROLE_MAGNITUDE: "magnitudes",
    TENSOR_ROLE_CONTROL: "control variate",
    TENSOR_ROLE_SCALAR: "numbers",
    TENSOR_ROLE_TEST_MATRIX: "test matrix O",
    TENSOR_ROLE_RANGE: "sketch Y",
    TENSOR_ROLE_CORANGE: "sketch Z",
    TENSOR_ROLE_BASIS: "basis Q",
}

_NEEDS: Final[dict[str, Keys]] = {
    "plain SGD": {"train": {"optimizer": "sgd", "weight_decay": 0, "max_grad_norm": 0}},
    "preferences": {"data": {"format": "preference"}},
    "`freeze_a` on LoRA": {"algorithm": {"parameters": {"freeze_a": True}}},
    "no model": {"model": {"name": "synthetic"}},
}
"""What a plan may have to say for a method to be right."""

REDUCERS: Final = {
    "sum": ("adds the updates up", "a few blocks of 1 MiB"),
    "rows": (
        "looks at all updates' values of a coordinate at once",
        "24 MiB of values; of more than 2,048 updates 12 KiB each",
    ),
    "products": (
        "takes all updates' inner products, then adds up by what they say",
        "32 MiB (of more than 2,048 updates 16 KiB each), and 40 K x K bytes for K updates: 38 MiB for 1,000",
    ),
    "products then rows": ("takes the inner products, then looks at the rows", "as for products, then as for rows"),
    "layers": ("makes each module's tensors from those of all sites", "one module's tensors of all sites, in float64"),
}
"""What the server does with a round's updates, and the memory that it takes."""


def _is_seeded(method: Method) -> bool:
    module = inspect.getmodule(method)
    return any(str(getattr(value, "__module__", "")).endswith(".seeds") for value in vars(module).values())


FAMILIES: Final[tuple[tuple[str, str, Callable[[Method], bool]], ...]] = (
    ("For load tests", "No model is trained.", lambda method: not method.needs_trainer),
    (
        "Preference",
        "Rows are pairs of a chosen and a rejected answer.",
        lambda method: changes(method.local_rule, "pair_loss"),
    ),
    ("Seeds and zeroth order", "Directions are drawn again from seeds rather than sent.", _is_seeded),
    (
        "Personalised",
        "Each site ends with a model of its own: `fsllm-client export` writes its adapter there. Of `fedalt` it is two "
        "adapters, and what mixes them for each token.",
        lambda method: example(method).personalised,
    ),
    (
        "Robust",
        "Some sites may send anything, by fault or on purpose.",
        lambda method: any(base.__module__.endswith(".robust") for base in method.__mro__),
    ),
    (
        "LoRA-aware",
        "They know that what a site has learned is the product B A.",
        lambda method: method.adapter_kinds is not None,
    ),
    ("Sums", "The adapter's deltas are added up; the server or the sites step in ways of their own.", lambda _: True),
)
"""The first whose test a method passes is its own."""

_ORDER: Final = (
    *("Sums", "LoRA-aware", "Robust", "Personalised", "Seeds and zeroth order", "Preference", "For load tests"),
)


def cell(text: str) -> str:
    """Return a text as it may stand in a table's cell."""
    return re.sub(r"\s+", " ", text).replace("|", "\\|")


def built_in() -> list[tuple[str, Method]]:
    """Return fsllm's own methods by name, family by family."""
    found = ((name, algorithm_class(name)) for name in algorithm_names())
    own = [(name, method) for name, method in found if method.__module__.startswith("fsllm_common.")]
    return sorted(own, key=lambda pair: (_ORDER.index(family(pair[1])[0]), pair[0]))


def family(method: Method) -> tuple[str, str]:
    """Return the name of a method's family, and what it is."""
    return next((title, what) for title, what, belongs in FAMILIES if belongs(method))


def tables() -> Iterator[str]:
    """Yield the tables, each with its heading."""
    methods = built_in()
    yield "## The methods\n"
    for (title, what), members in groupby(methods, key=lambda pair: family(pair[1])):
        rows = [
            (f"`{name}`", _source(method), _kept_by_the_server(method), f"{method.server_learning_rate:g}")
            for name, method in members
        ]
        yield f"### {title}\n\n{what}\n"
        yield _markdown(("`algorithm.name`", "method and source", "the server keeps", "rate"), rows)
    yield "### Not as in their papers\n"
    departing = [(name, (cell(method.departs),)) for name, method in methods if method.departs]
    yield _markdown(("", "what is otherwise, and why"), _together(departing))
    trained = [(name, method) for name, method in methods if method.needs_trainer]
    yield "## What travels\n"
    yield (
        "Between each site and the server, in each round: up as deltas, down as far as the round has changed it. "
        "*adapter*: its tensors, of whatever kind; A, B, R: the factors of a LoRA; *entry*: of the base-delta ledger, "
        "with r the plan's rank and K the round's sites.\n"
    )
    travel = ("", "up", "down", "down once", "stays at the site")
    yield _markdown(travel, _together((name, _travels(example(method))) for name, method in trained))
    yield "## What goes together\n"
    yield (
        "*yes*: `fsllm plan check` takes such a plan. *Ranks*: `adapter.ranks`, sites whose adapters differ in rank, "
        "which are put together by *layers*. "
        "*Async*: `cohort.buffer`. *Noise*: clip and noise in the pipeline. *Only the sum*: the server needs nothing "
        "but the sum of what the sites send (at equal ranks), which is what secure aggregation would give it.\n"
    )
    fit = ("", "reducer", "ranks", "async", "noise", "only the sum", "adapters", "and needs")
    yield _markdown(fit, _together((name, _goes_with(method)) for name, method in trained))
    yield "The reducer is what the server does with a round's updates. It decides the memory:\n"
    used = {example(method).reducer() for _, method in methods}
    reducers = [(name, *said) for name, said in REDUCERS.items() if name in used]
    yield _markdown(("reducer", "the server", "memory, however large the adapter"), reducers)
    yield "Some refuse more, for reasons of their own:\n"
    yield _markdown(("methods", "keys", "why not"), _refusals([method for _, method in trained]))


def _together(rows: Iterable[tuple[str, tuple[str, ...]]]) -> list[tuple[str, ...]]:
    """Return a row for all names of which the same is to be said, where the first of them stood."""
    found: dict[tuple[str, ...], list[str]] = {}
    for name, said in rows:
        found.setdefault(said, []).append(f"`{name}`")
    return [(", ".join(names), *said) for said, names in found.items()]


def _refusals(methods: Sequence[Method]) -> Iterator[tuple[str, str, str]]:
    """Yield methods, keys and reason of each refusal: of those that share it, the ones where some plan meets it."""
    found: dict[tuple[str, str], dict[str, bool]] = {}
    for method in methods:
        trials = [method(_plan(method, asked(method))) for asked in _ASKED.values()]
        for refusal in method.refuses:
            met = any(refusal.when(trial) for trial in trials)
            found.setdefault((refusal.keys, refusal.why), {})[method.name] = met
    for (keys, why), names in found.items():
        ones = [name for name, met in names.items() if met] or list(names)
        yield ", ".join(f"`{name}`" for name in ones), ", ".join(f"`{key}`" for key in keys.split(", ")), why


# One method.


@cache
def fitting(method: Method, also: str = "") -> tuple[Plan, tuple[str, ...]] | None:
    """Return a plan of the method that is not refused, and what it had to say for that; None where there is none.

    Args:
        method: Whose plan.
        also: What the plan has besides, of ``_ASKED``.

    """
    asked = _ASKED[also](method) if also else {}
    kind = (method.adapter_kinds or ("lora",))[0]
    least = method(_plan(method, {"adapter": {"kind": kind}})).least_updates()
    base: Keys = {"adapter": {"kind": kind, "rank": _RANK}, "cohort": {"quorum": max(2, least)}}
    said: list[str] = []
    plan = _plan(method, base, asked)
    while reasons := _reasons(method, plan):
        trials = [
            (label, _plan(method, base, asked, *(_NEEDS[one] for one in (*said, label))))
            for label in _NEEDS
            if label not in said and _understands(method, _NEEDS[label])
        ]
        better = [(len(_reasons(method, trial)), label, trial) for label, trial in trials]
        if not better or min(better)[0] >= len(reasons):
            return None
        _, label, plan = min(better, key=lambda trial: trial[0])
        said.append(label)
    return plan, tuple(said)


def example(method: Method) -> Algorithm:
    """Return the method with a plan that fits it.

    Raises:
        ValueError: No such plan is known: ``_NEEDS`` lacks what the method needs.

    """
    found = fitting(method)
    if found is None:
        raise ValueError(f"{method.name}: {'; '.join(_reasons(method, _plan(method, {})))}")
    return method(found[0])


def _of_kind(kind: str) -> Callable[[Method], Keys]:
    return lambda _: {"adapter": {"kind": kind}}


_ASKED: Final[dict[str, Callable[[Method], Keys]]] = {
    "ranks": lambda _: {"adapter": {"ranks": [_RANK // 2]}},
    "async": lambda method: {"cohort": {"buffer": {"size": example(method).plan.cohort.quorum, **_weight(method)}}},
    "noise": lambda _: {
        "pipeline": [{"stage": "clip", "norm": 1.0}, {"stage": "noise", "multiplier": 1.0}],
        "algorithm": {"weighting": "uniform"},
    },
    **{kind: _of_kind(kind) for kind in typing.get_args(AdapterKind)},
}
"""What a plan may have besides."""


def _weight(method: Method) -> Keys:
    """Return what a buffer has to say of stale updates of more than the adapter."""
    return {"weight": "constant"} if method.any_version else {}


def _plan(method: Method, *layers: Keys) -> Plan:
    raw: dict[str, Any] = {
        "name": "p",
        "rounds": 4,
        "model": {"name": "m"},
        "algorithm": {"name": method.name},
        "cohort": {"sites": [f"site-{number}" for number in range(12)]},
        "evaluate": {"metrics": ["loss"]},
        "data": {"packing": False},
    }
    for layer in layers:
        for key, value in layer.items():
            raw[key] = {**raw.get(key, {}), **value} if isinstance(value, dict) else value
    return Plan.model_validate(raw)


def _understands(method: Method, keys: Keys) -> bool:
    wanted: Keys = keys.get("algorithm", {}).get("parameters", {})
    return wanted.keys() <= method.parameters_type.model_fields.keys()


def _reasons(method: Method, plan: Plan) -> list[str]:
    made = method(plan)
    return [
        *(f"{combination.keys}: {combination.why}" for combination in REFUSED if combination.refused(plan)),
        *(f"{refusal.keys}: {refusal.why}" for refusal in method.refuses if refusal.when(made)),
    ]


def _module_doc(method: Method) -> str:
    return inspect.getdoc(inspect.getmodule(method)) or ""


def _source(method: Method) -> str:
    return _module_doc(method).split("\n\n")[0]


def _kept_by_the_server(method: Method) -> str:
    algorithm = example(method)
    numbers = [] if method.remembers is Algorithm.remembers else ["some numbers"]
    return ", ".join([*algorithm.state(), *numbers])


def _adapter(algorithm: Algorithm) -> dict[str, tuple[int, ...]]:
    shapes = _SHAPES["lora-xs" if algorithm.plan.adapter.kind == "lora-xs" else "lora"]
    return {f"{_LAYER}.{name}.weight": shape for name, shape in shapes.items()}


def _travels(algorithm: Algorithm) -> tuple[str, str, str, str]:
    adapter = _adapter(algorithm)
    added = algorithm.extra(adapter)  # noqa: S610 (no database)
    parts = {name: algorithm.part_of(name, role_of(name)) for name in (*adapter, *added)}
    shared = [name for name in parts if role_of(name) not in algorithm.personal]

    def of(wanted: Collection[str]) -> str:
        names = [name for name in shared if parts[name] in wanted]
        whole = adapter.keys() <= set(names)
        return ", ".join([*(["adapter"] if whole else []), *_words(n for n in names if not (whole and n in adapter))])

    rounds = range(1, algorithm.plan.rounds + 1)
    moving = [algorithm.moving(number) for number in rounds]
    changed = [algorithm.remade(number) for number in rounds] if algorithm.needs_layers else moving
    never = {parts[name] for name in shared}.difference(*moving, *changed)
    return (
        _by_round([of(wanted) for wanted in moving]),
        _by_round([of(wanted) + _gained(algorithm) for wanted in changed]),
        of(never),
        ", ".join(_kept(algorithm)),
    )


def _gained(algorithm: Algorithm) -> str:
    """Return what a round of K sites adds to the base-delta ledger, in words."""
    two, three = (algorithm.base_delta([_RANK] * updates, []) for updates in (2, 3))
    if two is None or three is None:
        return ""
    each = (three.rank - two.rank) // _RANK
    rest = two.rank // _RANK - 2 * each
    ranks = "r" if not each else "K r" if not rest else f"(K + {rest}) r"
    return f", an entry of rank {ranks}"


def _by_round(said: Sequence[str]) -> str:
    return said[0] if len(set(said)) == 1 else f"odd rounds: {said[0]}; even: {said[1]}"


def _words(names: Iterable[str]) -> list[str]:
    roles = dict.fromkeys(role_of(name) for name in names)
    return [_WORDS.get(role, TensorRole.Name(role)) for role in roles]


def _kept(algorithm: Algorithm) -> Iterator[str]:
    if algorithm.personal:
        yield ", ".join(_words(name for name in _adapter(algorithm) if role_of(name) in algorithm.personal))
    rule = algorithm.local_rule
    own = [base for base in rule.__mro__ if issubclass(base, LocalRule) and base is not LocalRule]
    functions = [value for base in own for value in vars(base).values() if inspect.isfunction(value)]
    if any("private" in function.__code__.co_names for function in functions):
        yield "a model of its own" if algorithm.personalised else "the rule's state"


def _goes_with(method: Method) -> tuple[str, ...]:
    algorithm = example(method)
    kinds = [kind for kind in typing.get_args(AdapterKind) if fitting(method, kind)]
    every = len(kinds) == len(typing.get_args(AdapterKind))
    found = fitting(method)
    needs = list(found[1]) if found is not None else []
    if algorithm.least_updates() > 1:
        needs.append(f"{algorithm.least_updates()} updates a round")
    if method.needs_trusted:
        needs.append("an evaluator")
    if method.in_pairs:
        needs.append("the same sites for two rounds")
    return (
        algorithm.reducer(),
        *("yes" if fitting(method, asked) else "" for asked in ("ranks", "async", "noise")),
        "yes" if only_the_sum(algorithm) else "",
        "any" if every else ", ".join(kinds),
        ", ".join(needs),
    )


def only_the_sum(algorithm: Algorithm) -> bool:
    """Tell whether the next version follows from the updates' weighted mean alone.

    Of a method that looks at modules it is tried out: two updates against one that is their mean.
    """
    if algorithm.reducer() == "sum":
        return True
    if not algorithm.needs_layers:
        return False
    import numpy as np

    adapter = _adapter(algorithm)
    added = algorithm.extra(adapter)  # noqa: S610 (no database)
    shapes = adapter | {name: array.shape for name, array in added.items()}
    draw = np.random.default_rng(0).standard_normal
    base = {module_and_key(name)[1]: draw(shape) for name, shape in shapes.items()}
    for number in (1, 2):
        moving = [name for name in shapes if algorithm.part_of(name, role_of(name)) in algorithm.moving(number)]
        two = [{module_and_key(name)[1]: draw(shapes[name]) for name in moving} for _ in range(2)]
        mean = {key: 0.5 * two[0][key] + 0.5 * two[1][key] for key in two[0]}
        apart = algorithm.combine_layer(_layer(number, base, [(0.5, tensors) for tensors in two]))
        at_once = algorithm.combine_layer(_layer(number, base, [(1.0, mean)]))
        if any(apart[key].shape != at_once[key].shape or not np.allclose(apart[key], at_once[key]) for key in apart):
            return False
    return True


def _layer(number: int, base: Mapping[str, Any], updates: Sequence[tuple[float, Mapping[str, Any]]]) -> Layer:
    made = [LayerUpdate(share, _RANK, 1.0, tensors) for share, tensors in updates]
    return Layer(number, _LAYER, base, 1.0, made, [])


def _markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    lines += [f"| {' | '.join(cell(text) for text in row)} |" for row in rows]
    return "\n".join(lines) + "\n"
