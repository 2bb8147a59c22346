"""Instruction tasks with short answers that can be checked, dealt unevenly to institutions.

`make_federation` gives every institution mostly rows of its own tasks and a few of the others,
and one held-out set over all tasks that is common to all. An input that is asked in the
held-out or in the validation set is in no institution's training rows under any wording, so
what is measured there is the skill and not the memory of a row. Which inputs these are does
not depend on the seed: hyper-parameters chosen on the validation rows of one seed have not
seen the held-out rows of another. Choose them on the validation rows only.

    python -m fsllm_bench.embedded.tasks --out DIR --seed 0
"""

import argparse
import itertools
import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Final, TypedDict

from fsllm_bench.embedded import lexicon

__all__ = [
    "SITES",
    "TASKS",
    "Federation",
    "FederationFiles",
    "Row",
    "Task",
    "make_federation",
    "own_tasks",
    "write_federation",
]

SITES: Final = ("hospital-a", "hospital-b", "hospital-c")
HELDOUT_PER_TASK: Final = 28
VALIDATION_PER_TASK: Final = 16
ROWS_PER_SITE: Final = 360
OTHERS_SHARE: Final = 0.02

_Pair = tuple[str, str]

_log = logging.getLogger(__name__)


class Row(TypedDict):
    """One line of a jsonl file: an instruction, what it is asked about, and the answer."""

    instruction: str
    input: str
    output: str
    task: str


@dataclass(frozen=True)
class Task:
    """A skill: some wordings of one instruction, and the inputs with their answers."""

    name: str
    instructions: tuple[str, ...]
    pairs: Callable[[], tuple[_Pair, ...]]

    def row(self, instruction: str, pair: _Pair) -> Row:
        """Return the row that asks `instruction` about the pair's input."""
        return Row(instruction=instruction, input=pair[0], output=pair[1], task=self.name)


def _opposites() -> tuple[_Pair, ...]:
    return tuple(pair for one, other in lexicon.OPPOSITES for pair in ((one, other), (other, one)))


def _plurals() -> tuple[_Pair, ...]:
    return tuple((noun, lexicon.plural(noun)) for noun in lexicon.NOUNS)


def _last_letters() -> tuple[_Pair, ...]:
    return tuple((word, word[-1]) for word in lexicon.SPELLED)


def _backwards() -> tuple[_Pair, ...]:
    return tuple((word, " ".join(reversed(word))) for word in lexicon.SPELLED)


def _sums() -> tuple[_Pair, ...]:
    return tuple((f"{a} + {b}", str(a + b)) for a in range(1, 16) for b in range(1, 16))


def _sequences() -> tuple[_Pair, ...]:
    return tuple(
        (f"{start} {start + step} {start + 2 * step}", str(start + 3 * step))
        for step in (1, 2, 3, 4, 5, 10)
        for start in range(1, 21)
    )


def _largest() -> tuple[_Pair, ...]:
    # The whole space is large: every 37th ordered triple is plenty, and 37 shares no factor
    # with the sizes of the inner loops, so that the largest falls on all three places alike.
    triples = itertools.permutations(range(1, 31), 3)
    return tuple((" ".join(map(str, triple)), str(max(triple))) for triple in itertools.islice(triples, 0, None, 37))


TASKS: Final[tuple[Task, ...]] = (
    Task(
        "opposite",
        ("Give the opposite of this word.", "Write the antonym.", "Which word is the contrary?"),
        _opposites,
    ),
    Task(
        "category",
        ("Name the category.", "What kind of thing is this?", "Which group does it belong to?"),
        lambda: tuple(lexicon.category_of.items()),
    ),
    Task(
        "clinic",
        (
            "Which clinic sees this patient?",
            "Choose the department for this complaint.",
            "Refer the patient to a clinic.",
        ),
        lambda: tuple(lexicon.clinic_of.items()),
    ),
    Task(
        "plural",
        ("Give the plural of this word.", "Write the form for many.", "Say it for more than one."),
        _plurals,
    ),
    Task(
        "last_letter",
        (
            "Give the last letter of this word.",
            "Which letter ends the word?",
            "Write only the final letter.",
        ),
        _last_letters,
    ),
    Task(
        "backwards",
        (
            "Spell this word backwards.",
            "Write the letters in reverse order.",
            "List the letters from last to first.",
        ),
        _backwards,
    ),
    Task(
        "addition",
        ("Add the two numbers.", "Give the sum.", "Work out the total."),
        _sums,
    ),
    Task(
        "next_number",
        ("Give the next number.", "Continue the sequence.", "Which number follows?"),
        _sequences,
    ),
    Task(
        "largest",
        ("Give the largest number.", "Which number is the greatest?", "Pick the maximum."),
        _largest,
    ),
)
"""All tasks; neighbours are alike, and one institution's own tasks are neighbours."""


@dataclass(frozen=True)
class Federation:
    """The rows of one federation, as `make_federation` deals them."""

    train: Mapping[str, tuple[Row, ...]]
    validation: tuple[Row, ...]
    heldout: tuple[Row, ...]


@dataclass(frozen=True)
class FederationFiles:
    """Where `write_federation` wrote what."""

    train: Mapping[str, Path]
    validation: Path
    heldout: Path


def own_tasks(sites: Sequence[str] = SITES) -> Mapping[str, tuple[Task, ...]]:
    """Deal the tasks to the sites in neighbouring runs of as equal a length as can be.

    Raises:
        ValueError: there is no site, a name twice, or a site would have no task.
    """
    count = len(sites)
    if not 1 <= count <= len(TASKS) or len(set(sites)) != count:
        raise ValueError(f"need 1 to {len(TASKS)} different sites, not {list(sites)}")
    bounds = [index * len(TASKS) // count for index in range(count + 1)]
    return {site: TASKS[bounds[i] : bounds[i + 1]] for i, site in enumerate(sites)}


def make_federation(
    seed: int = 0,
    *,
    sites: Sequence[str] = SITES,
    rows_per_site: int = ROWS_PER_SITE,
    others_share: float = OTHERS_SHARE,
) -> Federation:
    """Deal a federation's data: a skewed training set a site, and two common balanced sets.

    Args:
        seed: decides every draw; the same seed gives the same rows in the same order.
        sites: the names of the institutions.
        rows_per_site: how many training rows each site holds.
        others_share: which part of them are rows of the tasks that are other sites' own.

    Raises:
        ValueError: the sites cannot be served, or a site asks for more rows than there are.
    """
    owned = own_tasks(sites)
    if not 0.0 <= others_share <= 1.0:
        raise ValueError(f"others_share is a part of one, not {others_share}")
    rng = Random(seed)  # noqa: S311 - data for a demonstration, not a secret
    pool: dict[str, list[Row]] = {}
    validation: list[Row] = []
    heldout: list[Row] = []
    for task in TASKS:
        pairs = list(task.pairs())
        Random(f"split of {task.name}").shuffle(pairs)  # noqa: S311 - the same for every seed
        asked, rest = pairs[:HELDOUT_PER_TASK], pairs[HELDOUT_PER_TASK:]
        tried, rest = rest[:VALIDATION_PER_TASK], rest[VALIDATION_PER_TASK:]
        heldout += [task.row(rng.choice(task.instructions), pair) for pair in asked]
        validation += [task.row(rng.choice(task.instructions), pair) for pair in tried]
        pool[task.name] = [task.row(instruction, pair) for pair in rest for instruction in task.instructions]
    train = {
        site: tuple(_deal(rng, pool, {task.name for task in own}, rows_per_site, others_share))
        for site, own in owned.items()
    }
    for common in (validation, heldout):
        rng.shuffle(common)
        _refuse_overlap(itertools.chain.from_iterable(train.values()), common)
    _refuse_overlap(validation, heldout)
    return Federation(train=train, validation=tuple(validation), heldout=tuple(heldout))


def _deal(rng: Random, pool: Mapping[str, list[Row]], own: set[str], rows: int, others_share: float) -> list[Row]:
    """Draw one site's rows, without a repetition, evenly over its own and over other tasks."""
    others = [name for name in pool if name not in own]
    for_others = round(rows * others_share) if others else 0
    dealt: list[Row] = []
    for names, share in ((sorted(own), rows - for_others), (others, for_others)):
        for index, name in enumerate(names):
            wanted = (index + 1) * share // len(names) - index * share // len(names)
            if wanted > len(pool[name]):
                raise ValueError(f"{wanted} rows of {name} wanted, {len(pool[name])} exist")
            dealt += rng.sample(pool[name], wanted)
    rng.shuffle(dealt)
    return dealt


def _refuse_overlap(training: Iterable[Row], common: Iterable[Row]) -> None:
    """Raise when an input of a task is asked on both sides, under whatever wording."""
    seen = {(row["task"], row["input"]) for row in training}
    twice = sorted({(row["task"], row["input"]) for row in common} & seen)
    if twice:
        raise ValueError(f"{len(twice)} inputs are on both sides of a split, such as {twice[0]}")


def write_federation(
    directory: Path,
    seed: int = 0,
    *,
    sites: Sequence[str] = SITES,
    rows_per_site: int = ROWS_PER_SITE,
    others_share: float = OTHERS_SHARE,
) -> FederationFiles:
    """Write `make_federation`'s rows: `SITE.jsonl` each, `validation.jsonl`, `heldout.jsonl`.

    The directory is made if it is missing; files of these names in it are replaced.
    """
    federation = make_federation(seed, sites=sites, rows_per_site=rows_per_site, others_share=others_share)
    directory.mkdir(parents=True, exist_ok=True)
    train = {site: _write(directory / f"{site}.jsonl", rows) for site, rows in federation.train.items()}
    return FederationFiles(
        train=train,
        validation=_write(directory / "validation.jsonl", federation.validation),
        heldout=_write(directory / "heldout.jsonl", federation.heldout),
    )


def _write(path: Path, rows: Iterable[Row]) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def main(arguments: Sequence[str] | None = None) -> None:
    """Write a federation's data from the command line."""
    parser = argparse.ArgumentParser(description="Write the embedded federation's data.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--seed", type=int, default=0, help="decides every draw")
    parser.add_argument("--rows", type=int, default=ROWS_PER_SITE, help="training rows a site")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    files = write_federation(options.out, options.seed, rows_per_site=options.rows)
    for path in (*files.train.values(), files.validation, files.heldout):
        _log.info("wrote %s", path)


if __name__ == "__main__":
    main()
