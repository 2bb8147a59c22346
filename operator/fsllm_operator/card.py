"""The README card of an exported adapter: what it is, who made it and how, what it scored, and how to load it."""

import json
from collections import defaultdict
from datetime import UTC
from typing import Any

from fsllm.v1.control_pb2 import Run
from fsllm_common import __version__
from fsllm_operator.rounds import columns, number, size, summarise

_HEADINGS = ("round", "updates", "examples", "bytes", "seconds", "training loss")


def card(run: Run, version: int, digest: str, parameters: int, config: dict[str, Any], server_version: str) -> str:
    """Return the card in Markdown, with the front matter that model hubs read.

    Args:
        run: As GetRun tells it, with plan, members and commits.
        version: The version exported.
        digest: Of its payload, hexadecimal.
        parameters: Elements in all its tensors.
        config: The adapter's PEFT configuration; empty when the run had no model.
        server_version: Of the server that made it.

    """
    plan = json.loads(run.plan)
    model = plan["model"]["name"]
    parts = [
        _front_matter(model),
        f"# {run.name}\n",
        f"An adapter for **{model}**, fine-tuned by a federation of institutions that shared no text: each trained on "
        "its own data, and only adapter tensors left it.\n",
        _facts(run, plan, version, digest, parameters, config, server_version),
        "## Rounds\n",
        _rounds(run, version),
        "## Sites\n",
        _sites(run, version),
        _privacy(plan),
    ]
    if config:
        parts += ["## How to load it\n", _usage(model, config)]
    return "\n".join(parts)


def _front_matter(model: str) -> str:
    name = json.dumps(model)  # a JSON string is a YAML string
    return f"---\nlibrary_name: peft\nbase_model: {name}\ntags:\n- federated\n- fsllm\n---\n"


def _facts(
    run: Run,
    plan: dict[str, Any],
    version: int,
    digest: str,
    parameters: int,
    config: dict[str, Any],
    server_version: str,
) -> str:
    adapter, algorithm = plan["adapter"], plan["algorithm"]
    kind = adapter["kind"]
    if kind in ("lora", "dora", "rslora", "lora-xs"):
        kind += f", rank {adapter['rank']}, alpha {adapter['alpha']:g}"
    committed = next((c for c in run.commits if c.version.number == version), None)
    made = committed.at.ToDatetime(tzinfo=UTC).strftime("%Y-%m-%d %H:%M UTC") if committed else "-"
    versions = f"fsllm {server_version} (server), {__version__} (export)"
    if config.get("peft_version"):
        versions += f", peft {config['peft_version']}"
    rows = {
        "Run": f"{run.name}, `{run.run_id}`",
        "Version": f"{version} of {plan['rounds']} planned rounds, committed {made}",
        "Base model": plan["model"]["name"]
        + (f", BLAKE3 `{plan['model']['digest']}`" if plan["model"]["digest"] else ""),
        "Adapter": f"{kind}; {parameters:,} parameters" if config else f"synthetic tensors; {parameters:,} parameters",
        "Algorithm": f"{algorithm['name']}, weighted by {algorithm['weighting']}",
        "Seed": str(plan["seed"]),
        "Digest": f"`{digest}` (BLAKE3, as committed in {plan['wire']['element_type']})",
        "Software": versions,
    }
    return "".join(["| | |\n|---|---|\n", *(f"| {name} | {value} |\n" for name, value in rows.items())])


def _rounds(run: Run, version: int) -> str:
    rounds = [summarise(c) for c in sorted(run.commits, key=lambda c: c.round) if c.version.number <= version]
    measured = columns(rounds)
    names = [*_HEADINGS, *(f"{scope} {metric.replace('_', ' ')}" for scope, metric in measured)]
    lines = [f"| {' | '.join(names)} |", f"|{'---|' * len(names)}"]
    for r in rounds:
        cells = [
            str(r.number),
            str(len(r.contributors)),
            str(r.examples),
            size(r.payload_bytes),
            f"{r.seconds:.1f}",
            number(r.train_loss),
            *(number(r.metrics.get(key)) for key in measured),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    if any(scope == "validation" for scope, _ in measured):
        lines.append("\nValidation is the sites' mean, each on rows of its own that it never trained on.")
    if any(scope == "held-out" for scope, _ in measured):
        lines.append("\nHeld-out is measured by evaluators on a common file.")
    return "\n".join(lines) + "\n"


def _sites(run: Run, version: int) -> str:
    rounds: dict[str, int] = defaultdict(int)
    examples: dict[str, int] = defaultdict(int)
    tokens: dict[str, int] = defaultdict(int)
    for commit in run.commits:
        if 0 < commit.version.number <= version:
            for c in commit.contributions:
                rounds[c.member] += 1
                examples[c.member] += c.examples
                tokens[c.member] += c.tokens
    spent = {m.name: m.epsilon for m in run.members if m.has_epsilon}
    names = sorted({*rounds, *(m.name for m in run.members if m.role == "site")})
    lines = ["| site | rounds | examples | tokens | ε |", "|---|---|---|---|---|"]
    for name in names:
        epsilon = f"{spent[name]:.3g}" if name in spent else "-"
        lines.append(f"| {name} | {rounds[name]} | {examples[name]} | {tokens[name]} | {epsilon} |")
    lines.append("\nExamples and tokens count once a round in which they were trained on.")
    return "\n".join(lines) + "\n"


def _privacy(plan: dict[str, Any]) -> str:
    stages = {stage["stage"]: stage for stage in plan["pipeline"]}
    if "noise" not in stages:
        return "No noise was added to the updates: they are not differentially private.\n"
    clip, noise = stages["clip"], stages["noise"]
    return (
        f"Every site clipped its updates to an L2 norm of {clip['norm']:g} and added Gaussian noise with multiplier "
        f"{noise['multiplier']:g} before they left it; ε is at δ = {noise['delta']:g}, over the whole run, for one "
        "site's whole contribution.\n"
    )


def _usage(model: str, config: dict[str, Any]) -> str:
    known = config.get("base_model_name_or_path") or model
    return f"""\
`BASE` is the folder (or hub name) of the base model, {json.dumps(known)} in this federation.

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

BASE = {json.dumps(known)}
tokenizer = AutoTokenizer.from_pretrained(BASE)
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE), ".")
```
"""
