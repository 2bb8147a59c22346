"""What was measured: as tables for people, as JSON for programs, and as a section of docs/performance.md."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import statistics
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from fsllm_bench.training.overhead import Overhead
from fsllm_bench.training.setting import Setting
from fsllm_bench.training.throughput import Compared
from fsllm_common.errors import InputError

BEGIN: Final = "<!-- training:begin -->"
END: Final = "<!-- training:end -->"

_LEARNT: Final = """\
Where a step's time went at first (torch's profiler, SmolLM2 in float32, two packed sequences of 496 tokens, 43 % of
them answers): the head and the loss over 49,152 words 21 %, LoRA's own small products, scalings and additions 18 %,
attention 11 %, the rest mostly the frozen layers' products. So the head is given the answers alone
(`trainer/answers.py`), which leaves 6 % of a step for it, and on a CPU attention computes the packed examples' own
blocks of the mask only (`trainer/attention.py`). Reading a kept optimizer's state into place cost 0.4 to 0.7 s at the
start of a round; it is done while the round is gathered. Packing leaves the short examples for its last sequences;
when those were dealt to the steps by chance, the loss after 752 examples was 0.8 % above the Trainer's (six orders
each, standard error 0.3 %), for steps differed more than steps of single examples do. Since every step takes
sequences of few and of many examples in the proportion of the whole (`data/batches.py`), it is 0.1 % (0.3 %). Looked
at and left: PEFT scales LoRA's wide product rather than its narrow one (4 %), and collating the next batch takes a
millisecond, so no thread does it ahead. Nothing here was run on a GPU."""

_LOSS: Final = "Loss on the held-out rows after so many examples"

_LIBRARIES: Final = ("torch", "transformers", "peft", "deepspeed", "accelerate")


def as_json(setting: Setting, compared: Compared, overhead: Overhead | None) -> dict[str, Any]:
    """Return everything, with the medians."""
    tokens = setting.answer_tokens
    return {
        "model": setting.model.name,
        "examples": setting.examples,
        "tokens": setting.tokens,
        "answer_tokens": tokens,
        "steps": setting.steps,
        "examples_a_step": setting.examples_a_step,
        "precision": setting.plan.train.precision,
        "ratio": compared.ratio,
        "ours": asdict(compared.ours) | {"answer_tokens_per_second": compared.ours.speed(tokens)},
        "plain": asdict(compared.plain) | {"answer_tokens_per_second": compared.plain.speed(tokens)},
        "loss_difference": dict(zip(("relative", "standard_error"), compared.loss_difference, strict=True)),
        "overhead": asdict(overhead) if overhead is not None else None,
    }


def show(console: Console, setting: Setting, compared: Compared, overhead: Overhead | None) -> None:
    """Print the tables."""
    for title, head, rows in _tables(setting, compared, overhead):
        table = Table(*head, title=title)
        for row in rows:
            table.add_row(*row)
        console.print(table)
    console.print(_verdict(setting, compared))


def write_section(path: Path, setting: Setting, compared: Compared, overhead: Overhead | None, command: str) -> None:
    """Put the section between its markers in the file, or at its end when it has none.

    Raises:
        InputError: SETTING_INVALID: only one of the markers is there.

    """
    old = path.read_text(encoding="utf-8") if path.exists() else "# Performance\n"
    section = f"{BEGIN}\n{_section(setting, compared, overhead, command)}\n{END}"
    if BEGIN not in old and END not in old:
        new = f"{old.rstrip()}\n\n{section}\n"
    elif old.count(BEGIN) == old.count(END) == 1 and old.index(BEGIN) < old.index(END):
        new = old[: old.index(BEGIN)] + section + old[old.index(END) + len(END) :]
    else:
        raise InputError("SETTING_INVALID", f"--write: {path} must hold {BEGIN} and {END} once, in this order")
    path.write_text(new, encoding="utf-8")


def _section(setting: Setting, compared: Compared, overhead: Overhead | None, command: str) -> str:
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in _LIBRARIES)
    lines = [
        "## Training at the client",
        "",
        f"`{command}`, {date.today()}: {os.cpu_count()} cores ({_processor()}), {_device()}, Python "
        f"{platform.python_version()}, {versions}.",
        "",
        f"{setting.examples} examples, {setting.tokens} tokens, {setting.answer_tokens} of them answers; LoRA of rank "
        f"{setting.plan.adapter.rank} on all linear layers, {setting.plan.train.precision}, AdamW on the host, ZeRO "
        f"stage {setting.plan.deepspeed.zero_stage}, sequences of at most {setting.plan.data.max_length} tokens. The "
        f"client takes {setting.plan.train.batch_size} packed sequences a step, the plain Trainer "
        f"{setting.examples_a_step} padded examples, so that both take about as many examples a step. A pass holds "
        f"each example once, and both train in {len(compared.ours.losses)} orders. Two resident processes take turns, "
        "pass by pass; the first pass in each order is not counted. "
        f"The plain Trainer's batches hold {setting.padded_tokens} tokens with their padding, the client's at most "
        f"{setting.packed_tokens}.",
    ]
    for title, head, rows in _tables(setting, compared, overhead):
        lines += ["", f"**{title}**", "", f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
        lines += [f"| {' | '.join(row)} |" for row in rows]
        if title == _LOSS:
            lines += ["", _verdict(setting, compared)]
    lines += ["", _LEARNT]
    return "\n".join(lines)


def _tables(
    setting: Setting, compared: Compared, overhead: Overhead | None
) -> list[tuple[str, list[str], list[list[str]]]]:
    tokens = setting.answer_tokens
    sides = (("fsllm-client", compared.ours), ("Hugging Face Trainer", compared.plain))
    speeds = [
        [
            name,
            f"{side.speed(tokens):.1f}",
            f"{tokens / max(side.seconds):.1f} to {tokens / min(side.seconds):.1f}",
            f"{statistics.median(side.seconds):.2f}",
            f"{side.speed(tokens) / compared.plain.speed(tokens):.2f}",
        ]
        for name, side in sides
    ]
    losses = [
        [f"{name}, order {order}", *(f"{loss:.4f}" for loss in found)]
        for name, side in sides
        for order, found in enumerate(side.losses, 1)
    ]
    passes = [f"{number * setting.examples} examples" for number in range(setting.passes + 1)]
    tables = [
        (
            f"Speed, {setting.model.name}, median of {len(compared.ours.seconds)} passes",
            ["trainer", "answer tokens/s", "from, to", "s a pass", "ratio"],
            speeds,
        ),
        (_LOSS, ["trainer, order of the batches", *passes], losses),
    ]
    if overhead is not None:
        waits = (
            ("from a version's commit to a site's first step", overhead.start),
            ("from a site's last step to the receipt", overhead.finish),
        )
        tables.append(
            (
                f"Overhead of a round: {overhead.rounds - 1} rounds after the first, two sites beside the server; "
                f"trainer processes started a site: {_each(overhead.trainer_starts)}, models loaded and data "
                f"tokenised: {_each(overhead.prepares)}",
                ["", "median s", "from, to"],
                [[name, f"{statistics.median(s):.2f}", f"{min(s):.2f} to {max(s):.2f}"] for name, s in waits],
            )
        )
    return tables


def _verdict(setting: Setting, compared: Compared) -> str:
    """Say whether the losses differ by more than the order of the batches explains: by two standard errors."""
    difference, error = compared.loss_difference
    same = abs(difference) <= 2 * error
    return (
        f"After {setting.passes * setting.examples} examples the client's loss is {abs(difference):.1%} "
        f"{'above' if difference > 0 else 'below'} the Trainer's (means over the orders), with a standard error of "
        f"{error:.1%}: {'no more than' if same else 'more than'} the order of the batches explains."
    )


def _each(counts: list[int]) -> str:
    return " and ".join(map(str, counts))


def _processor() -> str:
    names = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return names[0] if names else platform.machine()


def _device() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
