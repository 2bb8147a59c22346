"""All of a site's data for one run, in one call."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from fsllm_client.data.readers import read_rows
from fsllm_client.data.splits import Split, in_key_order, split
from fsllm_client.data.templates import check_template
from fsllm_client.data.tokenise import Encoded, Tally, encode
from fsllm_common.errors import DataInvalid
from fsllm_common.plan import Plan

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class SiteData:
    """What a member trains on and measures with.

    ``validation`` is in a random but stable order, so that its first part is a fair sample. ``counts`` are for
    reports: rows, train_rows, validation_rows, held_out_rows (validation past the plan's limit), skipped_rows,
    truncated_rows. ``notes`` are sentences for the log. Neither holds any content.
    """

    train: list[Encoded]
    validation: list[Encoded]
    counts: dict[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def load_site_data(
    path: Path,
    plan: Plan,
    tokenizer: "PreTrainedTokenizerBase",
    role: Literal["site", "evaluator"],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> SiteData:
    """Read, split and tokenise a member's rows. An evaluator's are all validation.

    Args:
        path: A file or a folder, as ``readers`` describes.
        plan: The run's plan; its ``data`` section and seed are used.
        tokenizer: The base model's.
        role: What this member does in the run.
        progress: Called now and then with rows done and rows in all.

    Raises:
        DataInvalid: the data can not be read, or no row is left to train on (site) or to measure with (evaluator).
        PlanInvalid: the template is unknown, or the tokenizer has none and the plan asks for it.
        ModelUnusable: the tokenizer has no end-of-sequence token.
        InputError: pyarrow is needed and missing.

    """
    check_template(plan.data.template)
    rows = read_rows(path, plan.data)
    if role == "evaluator":
        sides = Split([], in_key_order(rows.examples, plan.seed), 0)
    else:
        sides = split(
            rows.examples,
            seed=plan.seed,
            fraction=plan.data.validation_fraction,
            limit=plan.data.validation_limit,
        )
    tally = Tally()
    done, total = 0, len(sides.train) + len(sides.validation)

    def advance(count: int) -> None:
        nonlocal done
        done += count
        progress(done, total)

    train, validation = (
        encode(
            side,
            tokenizer=tokenizer,
            template=plan.data.template,
            max_length=plan.data.max_length,
            tally=tally,
            progress=advance,
        )
        for side in (sides.train, sides.validation)
    )
    if not (validation if role == "evaluator" else train):
        raise DataInvalid(
            f"{path}: of {len(rows.examples)} rows none is left to {'train on' if role == 'site' else 'measure with'}: "
            f"{tally.without_answer} have no answer, {tally.cut_off} have a prompt that fills data.max_length = "
            f"{plan.data.max_length} tokens, {len(sides.validation) + sides.held_out} are for validation.",
            cure="Raise data.max_length, lower data.validation_fraction, or add rows.",
        )
    counts = {
        "rows": len(rows.examples),
        "train_rows": len(train),
        "validation_rows": len(validation),
        "held_out_rows": sides.held_out,
        "skipped_rows": tally.skipped,
        "truncated_rows": tally.truncated,
    }
    return SiteData(train, validation, counts, (*rows.notes, *_notes(plan, role, sides, tally, len(validation))))


def _notes(plan: Plan, role: str, sides: Split, tally: Tally, validation: int) -> list[str]:
    data = plan.data
    found = [
        (tally.without_answer, "rows have no answer and were skipped."),
        (tally.cut_off, f"rows were skipped: the prompt alone fills data.max_length = {data.max_length} tokens."),
        (tally.truncated, f"rows were cut at the end to data.max_length = {data.max_length} tokens."),
        (
            tally.rewritten,
            "conversations are trained on their later answers only: the chat template rewrites earlier turns.",
        ),
        (sides.held_out, "validation rows past data.validation_limit are neither trained on nor measured."),
    ]
    notes = [f"{count} {what}" for count, what in found if count]
    if role == "site" and data.validation_fraction > 0 and not validation:
        notes.append(
            "No row fell to validation: this site reports no validation loss. More rows, or a larger fraction, would."
        )
    return notes
