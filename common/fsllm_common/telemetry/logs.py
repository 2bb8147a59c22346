"""Logging: structlog, for people at a terminal, one JSON object a line elsewhere.

Every line carries what ``bound`` has put around it (run, round, site), also across awaits. Lines say what happened and
to whom; they never hold a row of data, a secret or a tensor.
"""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Literal, TextIO

from fsllm_common.text import printable

# structlog imports rich for coloured tracebacks wherever rich is installed: 4 MiB that a daemon never uses. None in
# sys.modules is the import system's own way to say "not there"; it is undone at once, so that others find rich.
_HIDE_RICH = "rich" not in sys.modules
if _HIDE_RICH:
    sys.modules["rich"] = None  # type: ignore[assignment]
try:
    import structlog
finally:
    if _HIDE_RICH:
        del sys.modules["rich"]

Logger = structlog.typing.FilteringBoundLogger
Level = Literal["debug", "info", "warning", "error"]


class _Forgiving:
    """A stream whose failures (a full disk under a log file, a reader who has gone) cost lines of the log, not work."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        with suppress(OSError):
            self._stream.write(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._stream.flush()


def configure(
    level: Level = "info", style: Literal["auto", "human", "json"] = "auto", stream: TextIO | None = None
) -> None:
    """Set up logging for this process, for the standard library's loggers (grpc's, sqlalchemy's) too.

    Args:
        level: The least that is written.
        style: auto writes for people when the stream is a terminal.
        stream: Where to; standard error by default.

    """
    stream = stream if stream is not None else sys.stderr
    human = style == "human" or (style == "auto" and stream.isatty())
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="%H:%M:%S" if human else "iso", utc=not human),
    ]
    ending: list[structlog.typing.Processor] = (
        [
            _printable,
            structlog.dev.ConsoleRenderer(
                colors=stream.isatty(), pad_event_to=0, exception_formatter=structlog.dev.plain_traceback
            ),
        ]
        if human
        else [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    )
    number = logging.getLevelNamesMapping()[level.upper()]
    structlog.configure(
        processors=[*shared, *ending],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.WriteLoggerFactory(file=_Forgiving(stream)),  # type: ignore[arg-type]  # it has what is used
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(stream)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared, processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *ending]
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(max(number, logging.WARNING))


def get_logger(**bound: Any) -> Logger:  # noqa: ANN401 - whatever structlog can render
    """Return a logger; use this rather than ``import structlog``, which would pull rich in."""
    logger: Logger = structlog.get_logger(**bound)
    return logger


def _printable(_logger: object, _method: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    """Keep a peer's words from writing lines and terminal commands of their own; JSON escapes them anyway."""
    return {
        key: printable(value) if isinstance(value, str) and key != "exception" else value
        for key, value in event.items()
    }


@contextmanager
def bound(**values: Any) -> Iterator[None]:  # noqa: ANN401
    """Put ``values`` (run, round, site) into every line logged inside, in this task and the tasks it starts."""
    with structlog.contextvars.bound_contextvars(**values):
        yield


def bind(**values: Any) -> None:  # noqa: ANN401
    """Put ``values`` into every later line of this task and the tasks it starts."""
    structlog.contextvars.bind_contextvars(**values)
