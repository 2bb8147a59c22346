"""The small world: the words and the facts that both the corpus and the tasks draw on.

Everything here is a constant table or a function of one, so that the pretraining text and the
answers of the tasks cannot disagree.
"""

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

__all__ = ["CATEGORIES", "CLINICS", "NOUNS", "OPPOSITES", "SPELLED", "category_of", "clinic_of", "plural"]

_CATEGORY_LINES: Final = """
animal: dog cat horse cow pig sheep goat mouse rabbit fox wolf bear lion tiger frog
bird: hen duck goose owl eagle hawk crow swan dove finch robin stork gull parrot turkey
fruit: apple pear plum peach lemon lime grape cherry melon fig mango berry banana orange date
vegetable: carrot onion potato tomato bean pea leek radish turnip cabbage celery beet pepper lettuce pumpkin
tool: hammer saw drill axe spade rake file chisel wrench ladder shovel brush pump lever needle
garment: shirt coat hat scarf glove sock shoe boot belt dress skirt jacket vest robe cap
furniture: table chair bed desk shelf couch bench stool lamp sofa chest wardrobe crib cupboard mirror
vehicle: car bus truck train boat ship bike tram van taxi plane ferry wagon sled canoe
instrument: piano violin flute drum harp guitar trumpet cello horn banjo organ tuba bugle fiddle gong
job: nurse doctor teacher baker farmer pilot judge sailor singer tailor lawyer miner painter cook clerk
"""

_OPPOSITE_LINES: Final = """
hot cold, big small, up down, left right, day night, fast slow, hard soft, high low, wet dry
open closed, old young, rich poor, strong weak, light dark, full empty, happy sad, near far
early late, long short, wide narrow, thick thin, deep shallow, loud quiet, clean dirty
good bad, true false, first last, inside outside, above below, start stop, push pull, give take
buy sell, win lose, come go, laugh cry, love hate, rise fall, north south, east west
front back, top bottom, king queen, man woman, boy girl, brother sister, father mother
summer winter, friend enemy, war peace, life death, question answer, sweet sour, smooth rough
sharp blunt, tight loose, heavy weightless, brave afraid, kind cruel, calm angry, safe risky
awake asleep, alive dead, simple complex, cheap costly, wise foolish, guilty innocent
public private, always never, before after, more less, many few, all none, arrive leave
remember forget, build destroy, accept refuse, attack defend, lend borrow, teach learn
send receive, float sink, freeze melt, enter exit, begin end, import export, shout whisper
"""

_CLINIC_LINES: Final = """
cardiology: chest pain, heart murmur, fast pulse, weak pulse, heart attack
cardiology: irregular heartbeat, high blood pressure, heart failure, valve leak
dermatology: skin rash, itchy skin, dry skin, acne, eczema, changing mole, warts, hives, sunburn
neurology: bad headache, migraine, seizure, stroke, tremor
neurology: numb hand, memory loss, dizzy spells, epilepsy
orthopedics: broken arm, broken leg, sprained ankle, knee pain, back pain
orthopedics: torn ligament, stiff hip, sore shoulder, twisted wrist
dentistry: toothache, bleeding gums, loose tooth, broken tooth, cavity
dentistry: sore gums, jaw abscess, lost filling, wisdom tooth
optometry: blurred vision, red eye, dry eyes, cataract, poor sight
optometry: new glasses, eye strain, double vision, watery eyes
urology: kidney stone, bladder pain, painful urine, blood in urine, bladder infection
urology: frequent urine, swollen kidney, prostate check, bladder leak
pediatrics: infant fever, child cough, baby rash, child vaccine, newborn check
pediatrics: infant colic, child fever, baby cough, infant feeding
psychiatry: panic attack, low mood, anxiety, depression, hearing voices
psychiatry: phobia, mood swings, constant worry, burnout
oncology: tumor, lymphoma, leukemia, breast lump, chemotherapy
oncology: melanoma, cancer scan, radiation plan, sarcoma
"""

_IRREGULAR_PLURALS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "mouse": "mice", "goose": "geese", "sheep": "sheep", "man": "men", "woman": "women",
        "child": "children", "foot": "feet", "tooth": "teeth", "person": "people", "ox": "oxen",
        "wolf": "wolves", "shelf": "shelves", "knife": "knives", "wife": "wives",
        "leaf": "leaves", "half": "halves", "loaf": "loaves", "thief": "thieves",
        "potato": "potatoes", "tomato": "tomatoes", "hero": "heroes", "mango": "mangoes",
    }
)  # fmt: skip

_MORE_NOUNS: Final = (
    "man woman child foot tooth person ox knife wife leaf half loaf thief hero box bus church "
    "glass dish city baby lady party story key day toy boy girl brother sister king queen friend "
    "enemy question answer watch class wish body river road house door window bottle"
)


def _keyed(lines: str) -> Mapping[str, tuple[str, ...]]:
    """Read lines of `key: item, item` (or items parted by blanks); a key may have more lines than one."""
    table: dict[str, tuple[str, ...]] = {}
    for line in lines.strip().splitlines():
        key, _, items = line.partition(": ")
        table[key] = (*table.get(key, ()), *items.split(", " if "," in items else " "))
    return MappingProxyType(table)


CATEGORIES: Final = _keyed(_CATEGORY_LINES)
"""Category to the things in it; no thing is in two categories."""

CLINICS: Final = _keyed(_CLINIC_LINES)
"""Clinic to the complaints it sees; no complaint is seen by two clinics."""

OPPOSITES: Final[tuple[tuple[str, str], ...]] = tuple(
    (pair.split()[0], pair.split()[1]) for line in _OPPOSITE_LINES.strip().splitlines() for pair in line.split(", ")
)
"""Pairs of opposites; every word has exactly one opposite."""

category_of: Final[Mapping[str, str]] = MappingProxyType(
    {thing: category for category, things in CATEGORIES.items() for thing in things}
)
clinic_of: Final[Mapping[str, str]] = MappingProxyType(
    {complaint: clinic for clinic, complaints in CLINICS.items() for complaint in complaints}
)
NOUNS: Final[tuple[str, ...]] = tuple(dict.fromkeys([*category_of, *_MORE_NOUNS.split()]))
"""Nouns that can be counted, in a fixed order."""

SPELLED: Final[tuple[str, ...]] = tuple(
    word for word in dict.fromkeys([*NOUNS, *(word for pair in OPPOSITES for word in pair)]) if 3 <= len(word) <= 5
)
"""Short words whose letters the corpus spells out."""


def plural(noun: str) -> str:
    """Return the plural of a noun of the lexicon."""
    if noun in _IRREGULAR_PLURALS:
        return _IRREGULAR_PLURALS[noun]
    if re.search(r"(s|x|ch|sh)$", noun):
        return f"{noun}es"
    if re.search(r"[^aeiou]y$", noun):
        return f"{noun[:-1]}ies"
    return f"{noun}s"
