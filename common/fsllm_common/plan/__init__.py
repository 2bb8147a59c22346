"""A run's plan: the schema, reading it from a file, and the combinations that are refused."""

from fsllm_common.plan.load import canonical_json, file_contents, plan_from_file, plan_from_json
from fsllm_common.plan.schema import Plan

__all__ = ["Plan", "canonical_json", "file_contents", "plan_from_file", "plan_from_json"]
