"""What a member may say at all: sizes and alphabets, looked at before anything is done with a message.

Whoever reads these words later (the log, the run's events, an operator's terminal, Prometheus) is safe from them.
Identifiers that are wrong are refused; sentences for people are made printable, because an honest site's may quote
anything.
"""

import math
import re
from collections.abc import Iterable
from typing import Final

from fsllm.v1.federation_pb2 import Answer, AttachRequest, Hello, Metric, Progress, UploadBegin
from fsllm_common.errors import Refused
from fsllm_common.text import printable

MAX_ATTACH: Final = 64 * 1024
"""Bytes of one message on the stream of orders."""
MAX_HELD: Final = 256
MAX_METRICS: Final = 64
MAX_SENTENCE: Final = 1000
"""Characters of what a member says to people; the rest is left out."""
MAX_COUNT: Final = 1 << 48
"""Of a metric's weight: any larger number is a lie, and would drown the others' in an average."""

_ORDER: Final = re.compile(r"[\x21-\x7e]{0,200}")
_WORDS: Final = re.compile(r"[\x20-\x7e]{0,64}")
_REASON: Final = re.compile(r"[A-Z0-9_]{0,64}")
_METRIC: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_ ./@:-]{0,63}")


def screen_attach(request: AttachRequest) -> None:
    """Check a message on the stream of orders, and make its sentences printable in place.

    Raises:
        Refused: MESSAGE_INVALID, naming the field.

    """
    if (size := request.ByteSize()) > MAX_ATTACH:
        raise _invalid(f"A message of {size} bytes on Attach is longer than {MAX_ATTACH}")
    match request.WhichOneof("kind"):
        case "hello":
            _hello(request.hello)
        case "answer":
            _answer(request.answer)
        case "progress":
            _progress(request.progress)


def screen_begin(begin: UploadBegin) -> None:
    """Check an upload's announcement, but not its manifest.

    Raises:
        Refused: MESSAGE_INVALID, naming the field.

    """
    _demand(_ORDER, begin.order_id, "order_id")
    _demand(_ORDER, begin.run_id, "run_id")
    _metrics(begin.metrics)


def _hello(hello: Hello) -> None:
    _demand(_WORDS, hello.software_version, "software_version")
    if len(hello.held_orders) > MAX_HELD:
        raise _invalid(f"held_orders has {len(hello.held_orders)} entries; at most {MAX_HELD} are allowed")
    for order in hello.held_orders:
        _demand(_ORDER, order, "held_orders")


def _answer(answer: Answer) -> None:
    _demand(_ORDER, answer.order_id, "order_id")
    match answer.WhichOneof("outcome"):
        case "declined":
            _demand(_REASON, answer.declined.reason, "reason")
            answer.declined.message = printable(answer.declined.message, MAX_SENTENCE)
        case "failed":
            _demand(_REASON, answer.failed.reason, "reason")
            answer.failed.message = printable(answer.failed.message, MAX_SENTENCE)
        case "done":
            _metrics(answer.done.metrics)


def _progress(progress: Progress) -> None:
    _demand(_ORDER, progress.order_id, "order_id")
    _demand(_WORDS, progress.activity, "activity")
    _metrics(progress.metrics)


def _metrics(metrics: Iterable[Metric]) -> None:
    for count, metric in enumerate(metrics, 1):
        if count > MAX_METRICS:
            raise _invalid(f"There are more than {MAX_METRICS} metrics")
        _demand(_METRIC, metric.name, "metric's name")
        if not (math.isfinite(metric.weight) and 0 <= metric.weight <= MAX_COUNT):
            raise _invalid(f"The weight of metric {metric.name!r} is not a number from 0 to {MAX_COUNT}")


def _demand(pattern: re.Pattern[str], text: str, what: str) -> None:
    if not pattern.fullmatch(text):
        raise _invalid(f"{what} {printable(text, 40)!r} is too long or holds a character that is not allowed")


def _invalid(message: str) -> Refused:
    return Refused("MESSAGE_INVALID", message)
