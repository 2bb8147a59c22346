"""Reading a plan from YAML, TOML or JSON, with errors that a person can act on."""

import difflib
import functools
import json
import re
import reprlib
import tomllib
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, Final, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from fsllm_common.algorithms import algorithm_class
from fsllm_common.errors import PlanInvalid
from fsllm_common.plan.combinations import refuse_combinations, weighting
from fsllm_common.plan.schema import Plan, Stage

if TYPE_CHECKING:
    import yaml

MAX_PLAN: Final = 1 << 20
"""Bytes of a plan file."""

_EXAMPLE: Final = "`fsllm plan example` prints a whole plan; docs/plans.md lists every key."
_MAX_TOLD: Final = 10
"""Keys that are told at once."""
_SHOULD_BE: Final = "input should be "

_TAGS: Final = tuple(str(stage.model_fields["stage"].default) for stage in get_args(get_args(Stage)[0]))


def plan_from_file(path: Path) -> Plan:
    """Read and check a plan from a .yaml, .yml, .toml or .json file.

    Raises:
        PlanInvalid: The file can not be read, a key is unknown or its value wrong, or keys do not go together.

    """
    raw = file_contents(path)
    try:
        return _plan(raw)
    except PlanInvalid as error:
        raise PlanInvalid(f"{path}: {error.message}", cure=error.cure) from error


def file_contents(path: Path, *, kind: str = "plan", cure: str | None = None) -> object:
    """Read a .yaml, .yml, .toml or .json file, with no key given twice; what it says is not checked.

    Args:
        path: The file's.
        kind: What an error calls it.
        cure: Where its text is wrong; a plan's when omitted.

    Raises:
        PlanInvalid: The file can not be read, or is not what its name says.

    """
    parsers = {".yaml": _parse_yaml, ".yml": _parse_yaml, ".toml": _parse_toml, ".json": _parse_json}
    parse = parsers.get(path.suffix.lower())
    if parse is None:
        raise PlanInvalid(f"{path}: a {kind}'s file name ends in {', '.join(parsers)}", cure="Rename the file.")
    try:
        data = path.read_bytes()
    except (OSError, ValueError) as error:  # a path with a NUL is no OSError
        what = error.strerror if isinstance(error, OSError) else error
        raise PlanInvalid(f"{path}: {what}", cure=f"Give the path of a {kind} file that you may read.") from error
    try:
        return _parse(parse, data)
    except PlanInvalid as error:
        raise PlanInvalid(f"{path}: {error.message}", cure=cure or error.cure) from error


def plan_from_json(data: bytes) -> Plan:
    """Read and check a plan from JSON, as it comes over the wire.

    Raises:
        PlanInvalid: Not JSON, a key is unknown or its value wrong, or keys do not go together.

    """
    return _plan(_parse(_parse_json, data))


def canonical_json(plan: Plan) -> bytes:
    """Return the plan with every key, sorted, without spaces: equal plans give equal bytes."""
    return json.dumps(plan.model_dump(mode="json"), sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _plan(raw: object) -> Plan:
    if not isinstance(raw, dict):
        what = "it is empty" if raw is None else f"this is a {type(raw).__name__}"
        raise PlanInvalid(f"a plan is a mapping of keys to values; {what}", cure=_EXAMPLE)
    try:
        plan = Plan.model_validate(raw)
    except ValidationError as error:
        raise PlanInvalid(_told(error.errors(include_url=False), Plan)) from error
    refuse_combinations(plan)
    return _with_parameters(plan)


def _with_parameters(plan: Plan) -> Plan:
    """Return the plan with all that its algorithm decides: a later default must not change a recorded plan."""
    algorithm = algorithm_class(plan.algorithm.name)
    kind = algorithm.parameters_type
    try:
        parameters = kind.model_validate(plan.algorithm.parameters)
    except ValidationError as error:
        raise PlanInvalid(_told(error.errors(include_url=False), kind, "algorithm.parameters.")) from error
    filled: dict[str, object] = {
        "parameters": parameters.model_dump(),
        "server_learning_rate": algorithm.learning_rate(plan),
        "weighting": weighting(plan),
    }
    return plan.model_copy(update={"algorithm": plan.algorithm.model_copy(update=filled)})


# Errors.


def _told(errors: Sequence[ErrorDetails], root: type[BaseModel], before: str = "") -> str:
    """Return 'key: what is wrong (got the value)' of each key, of which the members of a union say one thing each."""
    told: dict[str, list[tuple[str, str]]] = {}
    for error in errors:
        key, known = _place(error["loc"], root, unknown=error["type"] == "extra_forbidden")
        told.setdefault(before + key, []).append(_explain(error, known))
    texts = [
        f"{key}: {messages[0][0]}"
        + "".join(f" or {message.removeprefix(_SHOULD_BE)}" for message, _ in messages[1:])
        + max((rest for _, rest in messages), key=len)
        for key, messages in told.items()
    ]
    more = [f"and {len(texts) - _MAX_TOLD} more"] if len(texts) > _MAX_TOLD else []
    return "; ".join([*texts[:_MAX_TOLD], *more])


def _explain(error: ErrorDetails, known: list[str]) -> tuple[str, str]:
    """Return what is wrong; and ' (got the value)', with the nearest known word where there is one."""
    match error["type"]:
        case "extra_forbidden":
            near = difflib.get_close_matches(str(error["loc"][-1]), known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known) or 'none'}"
            return f"unknown key; {hint}", ""
        case "missing":
            return "this key is required", ""
        case "union_tag_not_found":
            return f"needs the key 'stage': {' or '.join(map(repr, _TAGS))}", ""
        case "union_tag_invalid":
            given, options = error["ctx"]["tag"], list(_TAGS)
            message = f"stage should be {' or '.join(map(repr, _TAGS))}"
        case "literal_error":
            given, options = error["input"], re.findall(r"'([^']*)'", str(error["ctx"]["expected"]))
            message = _lower(error["msg"])
        case "model_type" | "model_attributes_type":
            given, options, message = error["input"], [], "should be a section with keys of its own"
        case _:
            given, options, message = error["input"], [], _lower(error["msg"])
    near = difflib.get_close_matches(given, options, n=1) if isinstance(given, str) else []
    return message, f" (got {_short(given)})" + (f"; did you mean {near[0]!r}?" if near else "")


def _lower(message: str) -> str:
    text = message.removeprefix("Value error, ")
    return text[:1].lower() + text[1:]


def _place(location: tuple[int | str, ...], root: type[BaseModel], *, unknown: bool) -> tuple[str, list[str]]:
    """Return the key as a person would write it, and the keys that the innermost section knows.

    Pydantic puts the members and tags of unions among the keys (``tuple[str, ...]``, ``clip``); they are left out.
    """
    key = ""
    section: type[BaseModel] | None = root
    choices: list[type[BaseModel]] = []
    mapping = False
    for at, step in enumerate(location):
        if isinstance(step, int):
            key += f"[{step}]"
        elif mapping:
            key, mapping = f"{key}.{step}", False
        elif "[" in step and not unknown:
            continue
        elif choices and (chosen := [c for c in choices if c.model_fields["stage"].default == step]):
            section, choices = chosen[0], []
        elif section is not None and step in section.model_fields:
            key += f".{step}"
            annotation = section.model_fields[step].annotation
            mapping = get_origin(annotation) is dict
            inner = _sections(annotation)
            section, choices = (inner[0], []) if len(inner) == 1 else (section if inner else None, inner)
        elif unknown and at == len(location) - 1:
            key += f".{step}"
    return key.removeprefix("."), list(section.model_fields) if section else []


def _sections(annotation: Any) -> list[type[BaseModel]]:  # noqa: ANN401 (a type expression)
    """Return the plan sections inside a type expression."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) in (Union, UnionType, tuple, Annotated):
        return [section for argument in get_args(annotation) for section in _sections(argument)]
    return []


def _short(value: object) -> str:
    shortener = reprlib.Repr()  # bounded in depth too: YAML aliases can make a value that is endless when printed
    shortener.maxstring, shortener.maxlevel = 80, 3
    text = shortener.repr(value)
    return text if len(text) <= 100 else text[:97] + "..."


# Parsers.


def _parse(parse: Callable[[str], object], data: bytes) -> object:
    if len(data) > MAX_PLAN:
        raise PlanInvalid(f"the file has {len(data)} bytes; at most {MAX_PLAN} are allowed")
    try:
        return parse(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise PlanInvalid(f"byte {error.start} is not UTF-8") from error
    except RecursionError as error:
        raise PlanInvalid("nested too deeply") from error


def _parse_json(text: str) -> object:
    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        found: dict[str, object] = {}
        for key, value in pairs:
            if key in found:
                raise PlanInvalid(f"{key}: this key appears twice in its section")
            found[key] = value
        return found

    try:
        return json.loads(text, object_pairs_hook=unique)
    except ValueError as error:
        raise PlanInvalid(f"not JSON: {error}") from error


def _parse_toml(text: str) -> object:
    try:
        return tomllib.loads(text)
    except ValueError as error:  # TOMLDecodeError is one, and so is a number of too many digits
        raise PlanInvalid(f"not TOML: {error}") from error


def _parse_yaml(text: str) -> object:
    import yaml  # here, because the daemons read only JSON

    try:
        loader = _yaml_loader()(text)  # looks for control characters
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise PlanInvalid(f"line {line}: not YAML: the character U+{ord(text[error.position]):04X}") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise PlanInvalid(f"{place}not YAML: {error.problem or error.context}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise PlanInvalid(f"not YAML: {error}") from error


@functools.cache
def _yaml_loader() -> "type[yaml.SafeLoader]":
    """Return a SafeLoader that refuses a key that appears twice; PyYAML's own keeps the last without a word."""
    import yaml

    class UniqueKeys(yaml.SafeLoader):
        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
            seen: set[str] = set()
            for key, _ in node.value:
                line = key.start_mark.line + 1
                if not isinstance(key, yaml.ScalarNode):
                    raise PlanInvalid(f"line {line}: a list or a section is no key (an unfilled {{{{ name }}}}?)")
                if key.value in seen:
                    raise PlanInvalid(f"line {line}: {key.value}: this key appears twice in its section")
                seen.add(key.value)
            return super().construct_mapping(node, deep)

    return UniqueKeys
