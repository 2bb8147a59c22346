"""The generated parts of the docs are what the code says now."""

from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from fsllm_common.errors import REASONS, Exit
from fsllm_common.plan import Plan, canonical_json, plan_from_file, plan_from_json
from fsllm_common.telemetry.metrics import ClientMetrics, ServerMetrics
from fsllm_operator.reference import (
    _EXIT_MEANINGS,
    GENERATED,
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
