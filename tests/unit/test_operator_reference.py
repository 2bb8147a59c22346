"""The generated parts of the docs are what the code says now."""

from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from fsllm_common.algorithms import algorithm_class, algorithm_names
from fsllm_common.errors import REASONS, Exit
from fsllm_common.plan import Plan, canonical_json, plan_from_file, plan_from_json
from fsllm_common.telemetry.metrics import ClientMetrics, ServerMetrics
from fsllm_operator.method_tables import built_in, example, fitting, only_the_sum
from fsllm_operator.reference import (
    _EXIT_MEANINGS,
    GENERATED,
    algorithm_reference,
    error_reference,
    generated_part,
    metric_reference,
    plan_example,
    plan_reference,
    write,
)

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize("name", GENERATED)
def test_docs_are_up_to_date(name: str) -> None:
    """To mend: python -m fsllm_operator.reference docs."""
    assert generated_part((DOCS / name).read_text()) == GENERATED[name]().strip()


def test_writing_touches_only_the_generated_part(tmp_path: Path) -> None:
    for name in GENERATED:
        text = (DOCS / name).read_text()
        (tmp_path / name).write_text(text.replace(generated_part(text), "old"))
    assert len(write(tmp_path)) == len(GENERATED)
    for name in GENERATED:
        assert (tmp_path / name).read_text() == (DOCS / name).read_text()
    assert write(tmp_path) == []


def test_a_doc_without_the_comments_is_refused(tmp_path: Path) -> None:
    for name in GENERATED:
        (tmp_path / name).write_text("no comments\n")
    with pytest.raises(ValueError, match="lacks the comments"):
        write(tmp_path)


def test_every_plan_key_is_in_the_reference() -> None:
    text = plan_reference()

    def keys(schema: dict[str, object], path: str) -> list[str]:
        found = []
        for name, value in schema.items():
            key = f"{path}.{name}" if path else name
            found += keys(value, key) if isinstance(value, dict) and value else [key]
        return found

    plan = Plan.model_validate({"name": "x", "model": {"name": "embedded"}}).model_dump(mode="json")
    wanted = [key for key in keys(plan, "") if key != "pipeline"]
    assert len(wanted) > 50
    assert [key for key in wanted if f"| `{key}` |" not in text] == []


def test_every_reason_and_exit_code_is_in_the_reference() -> None:
    text = error_reference()
    assert [name for name in REASONS if f"`{name}`" not in text] == []
    codes = {value for name, value in vars(Exit).items() if name.isupper()}
    assert codes | {reason.exit for reason in REASONS.values()} <= _EXIT_MEANINGS.keys()


def test_every_metric_is_in_the_reference() -> None:
    text = metric_reference()
    for end in (ServerMetrics(), ClientMetrics()):
        registry: CollectorRegistry = end.registry
        names = {family.name for family in registry.collect() if family.name.startswith("fsllm_")}
        assert len(names) > 10
        assert [name for name in names if f"`{name}" not in text] == []


def test_the_example_is_the_plan_of_all_defaults(tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(plan_example())
    minimal = plan_from_json(b'{"name": "my-run", "model": {"name": "embedded"}}')
    assert canonical_json(plan_from_file(path)) == canonical_json(minimal)


def rows(text: str, heading: str) -> dict[str, tuple[str, ...]]:
    """Return the other cells of a section's tables by each name in the first cell, where it first stands."""
    lines = text.split(f"{heading}\n")[1].split("\n## ")[0].splitlines()
    table = [line.removeprefix("| ").removesuffix(" |").split(" | ") for line in lines if line.startswith("| `")]
    found: dict[str, tuple[str, ...]] = {}
    for names, *rest in table:
        for name in names.replace("`", "").split(", "):
            found.setdefault(name, tuple(rest))
    return found


def test_every_method_is_in_each_table() -> None:
    text = algorithm_reference()
    names = {name for name in algorithm_names() if algorithm_class(name).__module__.startswith("fsllm_common.")}
    assert len(names) > 30
    assert names <= rows(text, "## The methods").keys()
    for heading in ("## What travels", "## What goes together"):
        assert names - {"noop"} <= rows(text, heading).keys()


def as_written(plan: Plan) -> bytes:
    return plan.model_dump_json(exclude_unset=True).encode()


def test_a_yes_is_a_plan_that_is_accepted() -> None:
    for name, method in built_in():
        plan = example(method).plan
        assert plan_from_json(as_written(plan)).algorithm.name == name
        for also in ("ranks", "async", "noise", "dora", "ia3"):
            if found := fitting(method, also):
                plan_from_json(as_written(found[0]))


@pytest.mark.parametrize(
    ("name", "up", "down", "once", "stays"),
    [
        ("fedavg", "adapter", "adapter", "", ""),
        ("ffa-lora", "B", "B", "A", ""),
        ("fed-sb", "R", "R", "A, B", ""),
        ("rolora", "odd rounds: B; even: A", "odd rounds: B; even: A", "", ""),
        ("fedsa-lora", "A", "A", "", "B"),
        ("flora", "adapter", "adapter, an entry of rank K r", "", ""),
        ("fedex-lora", "adapter", "adapter, an entry of rank (K + 1) r", "", ""),
        ("scaffold", "adapter, control variate", "adapter, control variate", "", "the rule's state"),
        ("ditto", "adapter", "adapter", "", "a model of its own"),
    ],
)
def test_what_travels_is_what_the_papers_say(name: str, up: str, down: str, once: str, stays: str) -> None:
    assert rows(algorithm_reference(), "## What travels")[name] == (up, down, once, stays)


@pytest.mark.parametrize(
    ("name", "reducer", "ranks", "asynchronous", "noise", "only_sum"),
    [
        ("fedavg", "sum", "", "yes", "yes", "yes"),
        ("flora", "layers", "yes", "", "yes", ""),
        ("fedask", "layers", "yes", "", "yes", "yes"),
        ("ffa-lora", "sum", "yes", "yes", "yes", "yes"),
        ("scaffold", "sum", "", "yes", "", "yes"),
        ("krum", "products", "", "yes", "yes", ""),
        ("median", "rows", "", "", "yes", ""),
        ("bulyan", "products then rows", "", "", "yes", ""),
    ],
)
def test_what_goes_together(name: str, reducer: str, ranks: str, asynchronous: str, noise: str, only_sum: str) -> None:
    found = rows(algorithm_reference(), "## What goes together")[name]
    assert found[:5] == (reducer, ranks, asynchronous, noise, only_sum)


def test_stacking_needs_more_than_the_sum_and_a_frozen_factor_does_not() -> None:
    needs = {name: not only_the_sum(example(method)) for name, method in built_in()}
    assert needs["flora"]
    assert needs["lora-fair"]
    assert not needs["rac-lora"]
    assert not needs["fedask"]
