"""Reference docs made from the code: every key of a plan, every algorithm, every reason of an error, every metric.

``python -m fsllm_operator.reference DOCS`` writes the generated parts of docs/plans.md, docs/algorithms.md,
docs/errors.md and docs/metrics.md in place; a test compares them. A generated part stands between two HTML comments.
"""

import inspect
import json
import sys
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, Literal

from prometheus_client.metrics import MetricWrapperBase
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from fsllm_common.errors import REASONS, Exit
from fsllm_common.plan.combinations import REFUSED
from fsllm_common.plan.schema import Clip, Noise, Plan
from fsllm_common.telemetry.metrics import ClientMetrics, ServerMetrics
from fsllm_operator.method_tables import built_in, cell, tables

BEGIN: Final = "<!-- generated: python -m fsllm_operator.reference docs -->"
END: Final = "<!-- end of the generated part -->"

_EXAMPLES: Final[dict[str, str]] = {"name": "my-run", "model.name": "embedded"}
"""Of the keys that have no default."""

_EXIT_MEANINGS: Final[dict[int, str]] = {
    0: "done",
    1: "a bug in fsllm: please report it",
    Exit.USAGE: "wrong usage of the command line, or a name that is none",
    Exit.CONFIGURATION: "a plan or a setting is wrong, or a package is missing",
    Exit.DATA: "the site's data can not be read as the plan says",
    Exit.MODEL: "the base model is missing or does not fit",
    Exit.IDENTITY: "join file, certificate or membership",
    Exit.REFUSED: "the other end, or the site's policy, says no",
    Exit.UNAVAILABLE: "the other end can not be reached, or a port is taken; trying again may help",
    Exit.STORAGE: "disk full, or the state folder or a back-up is in use, damaged or of a newer version",
    Exit.TRAINING: "training failed: not a number, out of memory, or a worker died",
    Exit.RUN_FAILED: "the run that was watched is paused or was cancelled; a step of the demo failed",
    130: "ended by Ctrl-C",
}


def plan_reference() -> str:
    """Return every key of a plan in Markdown, a table a section, and the combinations that are refused."""
    return "\n".join([*_sections(), "### What does not go together\n", *_refused()])


def algorithm_reference() -> str:
    """Return this package's algorithms in Markdown: source, what travels, what goes together, and parameters."""
    own = [
        _table(method.parameters_type, "", f"### `{name}`\n")
        for name, method in sorted(built_in())
        if method.parameters_type.model_fields
    ]
    return "\n".join([*tables(), "## Parameters\n", "Under `algorithm.parameters`.\n", *own])


def error_reference() -> str:
    """Return the exit codes and every reason with its status, exit code and cure, in Markdown."""
    lines = ["## Exit codes\n", "| code | meaning |", "|---|---|"]
    lines += [f"| {code} | {meaning} |" for code, meaning in sorted(_EXIT_MEANINGS.items())]
    lines += ["", "## Reasons\n", "| reason | gRPC status | exit code | what to do |", "|---|---|---|---|"]
    lines += [
        f'| <a id="{name.lower()}"></a>`{name}` | {reason.status} | {reason.exit} | {cell(reason.cure)} |'
        for name, reason in sorted(REASONS.items())
    ]
    return "\n".join(lines) + "\n"


def metric_reference() -> str:
    """Return every metric of both ends with its type, labels and meaning, in Markdown."""
    lines: list[str] = []
    for title, end in (("Server", ServerMetrics()), ("Client", ClientMetrics())):
        lines += [f"## {title}\n", "| metric | type | labels | meaning |", "|---|---|---|---|"]
        lines += sorted(_metric(m) for m in _metrics(end))
        lines.append("")
    return "\n".join(lines)


def plan_example() -> str:
    """Return a plan in YAML with every key, at its default, each with its meaning as a comment."""
    return "# Delete what you do not change: everything but name and model has a default.\n" + "".join(
        _yaml(Plan, prefix="", indent=0)
    )


def write(docs: Path) -> list[Path]:
    """Bring the generated parts in ``docs`` up to date; returns the files that changed."""
    changed = []
    for name, text in GENERATED.items():
        path = docs / name
        before = path.read_text(encoding="utf-8")
        after = _replaced(before, text(), path)
        if after != before:
            path.write_text(after, encoding="utf-8")
            changed.append(path)
    return changed


def generated_part(text: str) -> str:
    """Return what stands between the two comments of a doc."""
    return text.partition(BEGIN)[2].partition(END)[0].strip("\n")


def _replaced(text: str, part: str, path: Path) -> str:
    if BEGIN not in text or END not in text:
        raise ValueError(f"{path} lacks the comments that enclose its generated part")
    return f"{text.partition(BEGIN)[0]}{BEGIN}\n\n{part.strip()}\n\n{END}{text.partition(END)[2]}"


def _sections() -> Iterator[str]:
    yield _table(Plan, "", "### The plan itself\n")
    for name, field in Plan.model_fields.items():
        section = _section(field)
        if section is not None:
            yield from _section_tables(section, name)
    yield "### `pipeline`\n"
    yield "A list of stages, applied to a site's delta in this order before it leaves; empty by default.\n"
    for stage in (Clip, Noise):
        yield _table(
            stage, "pipeline", f"`stage: {stage.model_fields['stage'].default}` - {_doc(stage)}\n", skip=("stage",)
        )


def _section_tables(section: type[BaseModel], path: str) -> Iterator[str]:
    yield _table(section, path, f"### `{path}`\n\n{_doc(section)}\n")
    for name, field in section.model_fields.items():
        for inner in filter(None, [_section(field), *map(_as_section, typing.get_args(field.annotation))]):
            yield from _section_tables(inner, f"{path}.{name}")


def _table(model: type[BaseModel], path: str, heading: str, skip: tuple[str, ...] = ()) -> str:
    lines = [heading, "| key | type | default | meaning |", "|---|---|---|---|"]
    for name, field in model.model_fields.items():
        if name in skip or _section(field) is not None or name == "pipeline":
            continue
        key = f"{path}.{name}" if path and path != "pipeline" else name
        default = "required" if field.is_required() else f"`{_value(field)}`"
        lines.append(f"| `{key}` | {cell(_type(field))} | {default} | {cell(field.description or '')} |")
    return "\n".join(lines) + "\n"


def _refused() -> Iterator[str]:
    yield "| keys | why |\n|---|---|"
    for combination in REFUSED:
        yield f"| `{combination.keys}` | {cell(combination.why)} |"


def _section(field: FieldInfo) -> type[BaseModel] | None:
    """Return the section that a field always is; one that may be left out has a line of its own, too."""
    return _as_section(field.annotation)


def _as_section(kind: Any) -> type[BaseModel] | None:  # noqa: ANN401 (a type expression)
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def _doc(model: type[BaseModel]) -> str:
    return " ".join((inspect.getdoc(model) or "").split())


def _type(field: FieldInfo) -> str:
    text = _type_text(field.annotation)
    bounds = [_bound(item) for item in field.metadata]
    return ", ".join([text, *(bound for bound in bounds if bound and bound not in text)])


def _bound(item: object) -> str:
    for name, sign in (("gt", ">"), ("ge", "≥"), ("lt", "<"), ("le", "≤")):
        value = getattr(item, name, None)
        if value is not None:
            return f"{sign} {value if isinstance(value, int) else format(value, 'g')}"
    return ""


def _type_text(kind: Any) -> str:  # noqa: ANN401 (a type expression)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        bounds = [_bound(item) for meta in arguments[1:] for item in _bounds_in(meta)]
        return ", ".join([_type_text(arguments[0]), *filter(None, bounds)])
    if origin is Literal:
        return " or ".join(f"`{argument}`" for argument in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join("null" if argument is type(None) else _type_text(argument) for argument in arguments)
    if origin is tuple:
        return f"list of {_type_text(arguments[0])}"
    if origin is dict:
        return f"mapping of {_type_text(arguments[0])} to {_type_text(arguments[1])}"
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return "section"
    return {str: "text", int: "integer", float: "number", bool: "true or false"}.get(kind, str(kind))


def _bounds_in(meta: object) -> list[object]:
    return list(meta.metadata) if isinstance(meta, FieldInfo) else [meta]


def _value(field: FieldInfo) -> str:
    default = field.get_default(call_default_factory=True, validated_data={})
    return _scalar(default)


def _scalar(value: object) -> str:
    if isinstance(value, float):
        return f"{value:g}" if value >= 1e-3 or value == 0 else _exponent(value)
    if isinstance(value, tuple):
        return f"[{', '.join(map(str, value))}]"
    if isinstance(value, str):
        return value
    return json.dumps(value)


def _exponent(value: float) -> str:
    mantissa, _, exponent = f"{value:e}".partition("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def _yaml(model: type[BaseModel], prefix: str, indent: int) -> Iterator[str]:
    pad = "  " * indent
    for name, field in model.model_fields.items():
        section = _section(field)
        key = f"{prefix}{name}"
        if section is not None:
            yield f"{pad}{name}:  # {_doc(section)}\n"
            yield from _yaml(section, f"{key}.", indent + 1)
            continue
        comment = f"  # {field.description}" if field.description else ""
        value = _EXAMPLES[key] if field.is_required() else _value(field)
        yield f"{pad}{name}: {value}{comment}\n"


def _metrics(end: ServerMetrics | ClientMetrics) -> Iterator[MetricWrapperBase]:
    yield from (value for value in vars(end).values() if isinstance(value, MetricWrapperBase))
    # build_info is set once and kept nowhere.
    collectors = end.registry._collector_to_names
    kept = {id(value) for value in vars(end).values()}
    yield from (c for c in collectors if isinstance(c, MetricWrapperBase) and id(c) not in kept)


def _metric(metric: MetricWrapperBase) -> str:
    family = next(iter(metric.describe()))
    name = f"{family.name}_total" if family.type == "counter" else family.name
    labels = ", ".join(f"`{label}`" for label in metric._labelnames)
    return f"| `{name}` | {family.type} | {labels} | {cell(family.documentation)} |"


GENERATED: Final = {
    "plans.md": plan_reference,
    "algorithms.md": algorithm_reference,
    "errors.md": error_reference,
    "metrics.md": metric_reference,
}


if __name__ == "__main__":
    for path in write(Path(sys.argv[1] if len(sys.argv) > 1 else "docs")):
        sys.stdout.write(f"{path}\n")
