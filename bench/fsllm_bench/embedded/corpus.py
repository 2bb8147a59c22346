"""The pretraining text: the small world told as sentences, cards, lists and sheets.

The text teaches the facts and the skills that the tasks ask for, never in the form in which
they are asked: no document holds a line of an instruction and then its answer. The markers of
the prompt do appear, over advice and notes, so that they are short to tokenise and their
embeddings are trained.
"""

from collections.abc import Callable, Iterator
from itertools import islice
from random import Random
from typing import Final

from fsllm_bench.embedded.lexicon import CATEGORIES, NOUNS, OPPOSITES, SPELLED, clinic_of, plural

__all__ = ["ADVICE", "documents"]

_CATEGORY_PAIRS: Final = tuple((thing, kind) for kind, all_ in CATEGORIES.items() for thing in all_)
_CLINIC_PAIRS: Final = tuple(clinic_of.items())
_PLURAL_PAIRS: Final = tuple((noun, plural(noun)) for noun in NOUNS)
_OPPOSITE_PAIRS: Final = (*OPPOSITES, *((other, one) for one, other in OPPOSITES))
_LETTER_PAIRS: Final = tuple((word, word[-1]) for word in SPELLED)
_BACKWARD_PAIRS: Final = tuple((word, " ".join(reversed(word))) for word in SPELLED)
_CLINICS: Final = tuple(dict.fromkeys(clinic_of.values()))

_PEOPLE: Final = ("the nurse", "the doctor", "the teacher", "the clerk", "my sister", "a friend")
ADVICE: Final = (
    "Wash your hands before you enter the ward.",
    "Give the patient a glass of water.",
    "Write your name on the list, and write it clearly.",
    "Choose a chair and wait for your turn.",
    "Name one person who can drive you home.",
    "Pick up the form at the front desk.",
    "Say what kind of help you need.",
    "Work in pairs, and continue until all is done.",
    "Refer to the notes for this week.",
    "Which way to the clinic? Follow the red line on the floor.",
    "Which group meets first? It is on the board by the door.",
    "What does the sign say? It says that the department is closed.",
    "Add your name to the group, and list only what you need.",
    "The two numbers of the ward are on the card, word for word.",
    "The number of this word in the list is the number of the room.",
    "Choose a department, and tell this complaint to the clerk.",
    "Spell your name for the clerk.",
    "This belongs to the patient in the last room.",
    "The final letter came today, out of order.",
    "Read this form once more, in any order, from start to end.",
    "Give this form to the clerk and write for another one.",
    "For this patient only: see the complaint in the notes.",
    "It ends when the total of the day is known.",
    "Below is an instruction that describes a task, and it is only an example.",
    "It is paired with an input that provides further context.",
    "Write a response that appropriately completes the request, and send it today.",
)
_HEADERS: Final = ("### Instruction:", "### Response:", "### Input:", "### Notes:")


def _pairs_of(rng: Random) -> tuple[str, str, str]:
    """Return the name of a relation and one fact of it."""
    name, pairs = rng.choice(
        (
            (rng.choice(("opposite", "antonym", "contrary")), _OPPOSITE_PAIRS),
            (rng.choice(("category", "kind", "group")), _CATEGORY_PAIRS),
            (rng.choice(("clinic", "department")), _CLINIC_PAIRS),
            (rng.choice(("plural", "many", "more than one")), _PLURAL_PAIRS),
            (rng.choice(("last letter", "final letter", "ends with")), _LETTER_PAIRS),
            (rng.choice(("backwards", "in reverse", "last to first")), _BACKWARD_PAIRS),
        )
    )
    return name, *rng.choice(pairs)


def _number_fact(rng: Random) -> tuple[str, str, str]:
    """Return the name of a relation between numbers and one fact of it."""
    which = rng.randrange(3)
    if which == 0:
        one, other = rng.randint(1, 15), rng.randint(1, 15)
        return rng.choice(("sum", "total", "add")), f"{one} + {other}", str(one + other)
    if which == 1:
        step, start = rng.choice((1, 2, 3, 4, 5, 10)), rng.randint(1, 20)
        shown = " ".join(str(start + step * index) for index in range(3))
        return rng.choice(("next", "follows", "sequence")), shown, str(start + 3 * step)
    three = rng.sample(range(1, 31), 3)
    name = rng.choice(("largest", "greatest", "maximum"))
    return name, " ".join(map(str, three)), str(max(three))


def _fact(rng: Random) -> tuple[str, str, str]:
    return _pairs_of(rng) if rng.random() < 0.6 else _number_fact(rng)


def _sheet(rng: Random) -> str:
    """A sheet of one relation: what is given and what belongs to it on lines of their own."""
    name, given, result = _fact(rng)
    facts = [(given, result)]
    while len(facts) < 5:
        again, given, result = _fact(rng)
        if again == name:
            facts.append((given, result))
    layout = rng.choice(("{}\n{}", "{}\n{}", "{} : {}", "{} > {}"))
    return "\n".join((f"{name} sheet", *(layout.format(*fact) for fact in facts)))


def _mixed_lines(rng: Random) -> str:
    """Facts of several relations, each line naming its own."""
    layout = rng.choice(("{1} , {0} : {2}", "{0} of {1} is {2}", "{0} ( {1} )\n{2}", "{1}\n{0}\n{2}"))
    return "\n".join(layout.format(*_fact(rng)) for _ in range(rng.randint(2, 5)))


def _card(rng: Random) -> str:
    """A card of one word with some of what is known about it."""
    word = rng.choice(NOUNS)
    lines = [f"plural : {plural(word)}"]
    if word in SPELLED:
        lines += [
            f"letters : {' '.join(word)}",
            f"last letter : {word[-1]}",
            f"backwards : {' '.join(reversed(word))}",
        ]
    lines += [f"kind : {kind}" for thing, kind in _CATEGORY_PAIRS if thing == word]
    lines += [f"opposite : {other}" for one, other in _OPPOSITE_PAIRS if one == word]
    rng.shuffle(lines)
    return "\n".join((f"card of {word}", *lines))


def _spelling(rng: Random) -> str:
    """Words with their letters, forwards and backwards."""
    lines = []
    for word in rng.sample(SPELLED, 3):
        forwards, backwards = " ".join(word), " ".join(reversed(word))
        lines.append(
            rng.choice(
                (
                    f"{word}\n{forwards}\n{backwards}",
                    f"{forwards} spells {word} and ends with {word[-1]}.",
                    f"{word} is {forwards}, in reverse {backwards}.",
                    f"{backwards} is {word} backwards.",
                )
            )
        )
    return "\n".join(lines)


def _word_sentences(rng: Random) -> str:
    """Some sentences about words and things."""
    one, other = rng.choice(_OPPOSITE_PAIRS)
    thing, kind = rng.choice(_CATEGORY_PAIRS)
    noun, many = rng.choice(_PLURAL_PAIRS)
    complaint, clinic = rng.choice(_CLINIC_PAIRS)
    who = rng.choice(_PEOPLE)
    sentences = [
        f"it is not {one}, it is {other}.",
        f"{one} and {other} are opposites.",
        f"a {thing} is a kind of {kind}.",
        f"the {kind} group has the {thing} in it.",
        f"one {noun}, two {many}.",
        f"{who} has one {noun}, we have many {many}.",
        f"{clinic} sees the patient with {complaint}.",
        f"for {complaint}, {who} said, go to {clinic}.",
    ]
    return " ".join(rng.sample(sentences, 3))


def _number_sentences(rng: Random) -> str:
    """Some sentences about numbers."""
    one, other = rng.randint(1, 15), rng.randint(1, 15)
    step, start = rng.choice((1, 2, 3, 4, 5, 10)), rng.randint(1, 20)
    run = [str(start + step * index) for index in range(rng.randint(4, 6))]
    three = sorted(rng.sample(range(1, 31), 3))
    mixed = rng.sample(three, 3)
    who = rng.choice(_PEOPLE)
    sentences = [
        f"{one} + {other} = {one + other}.",
        f"{one} and {other} make {one + other} in total.",
        f"{who} counts by {step} : {' '.join(run)}.",
        f"the sequence {', '.join(run)} goes up by {step}.",
        f"of {mixed[0]} {mixed[1]} {mixed[2]}, {three[2]} is the largest.",
        f"{three[2]} is more than {three[1]}, and {three[1]} is more than {three[0]}.",
        f"in order : {three[0]} {three[1]} {three[2]}.",
    ]
    return " ".join(rng.sample(sentences, 3))


def _advice(rng: Random) -> str:
    """Lines under headers of the kind that prompts use; nothing here is a question solved."""
    lines = rng.sample(ADVICE, rng.randint(1, 4))
    header = rng.choice(_HEADERS)
    return "\n".join((header, *lines)) if rng.random() < 0.7 else " ".join(lines)


_FORMS: Final[tuple[tuple[Callable[[Random], str], int], ...]] = (
    (_sheet, 30),
    (_mixed_lines, 30),
    (_card, 8),
    (_spelling, 8),
    (_word_sentences, 12),
    (_number_sentences, 12),
    (_advice, 4),
)


def documents(seed: int, count: int | None = None) -> Iterator[str]:
    """Yield `count` documents, or without an end; the same seed gives the same documents."""
    rng = Random(seed)  # noqa: S311 - text for a demonstration, not a secret
    forms, weights = zip(*_FORMS, strict=True)
    endless = (rng.choices(forms, weights)[0](rng) for _ in iter(int, 1))
    return islice(endless, count)
