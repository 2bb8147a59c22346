"""What is stripped from an answer before it is compared with the reference, by the plan's ``evaluate.normalizer``."""

import re
from decimal import Decimal, InvalidOperation
from typing import Literal

Normalizer = Literal["strip", "lower", "gsm8k", "number"]

_NUMBER = re.compile(r"-?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")
_GSM8K = re.compile(r"####\s*\$?\s*(-?[\d.,]+)")


def normalise(how: Normalizer, text: str) -> str | None:
    """Return what of ``text`` is compared, or None when it holds no answer of the kind looked for.

    - ``strip``: without white space around it.
    - ``lower``: as strip, in lower case, and any white space inside is one blank.
    - ``number``: the last number in the text, thousands' commas removed, 3.50 equal to 3.5.
    - ``gsm8k``: the number after the last '####' (Cobbe et al. 2021, arXiv 2110.14168), written as for ``number``.
    """
    match how:
        case "strip":
            return text.strip()
        case "lower":
            return " ".join(text.lower().split())
        case "number":
            return _number(_NUMBER.findall(text))
        case "gsm8k":
            return _number(_GSM8K.findall(text))


def same_answer(how: Normalizer, answer: str, reference: str) -> bool:
    """Tell whether both hold an answer and it is the same."""
    found = normalise(how, answer)
    return found is not None and found == normalise(how, reference)


def _number(candidates: list[str]) -> str | None:
    if not candidates:
        return None
    try:
        value = Decimal(candidates[-1].replace(",", "").rstrip("."))
    except InvalidOperation:
        return None
    # normalize() turns 100 into 1E+2 and -0 into -0: format as plain digits, and let zero have no sign.
    return f"{value.normalize():f}" if value else "0"
