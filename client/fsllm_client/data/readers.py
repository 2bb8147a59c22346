"""A file, or a folder with all beneath it, becomes a list of examples.

============  =======================================================================================================
.jsonl        one object a line; empty lines are passed over
.json         an array of objects, or one object a line (as many public sets name their JSON lines)
.csv          a header line, then one row a record; quoted fields may hold commas and newlines
.parquet .pq  one record a row (needs pyarrow)
.txt          plain text: each paragraph, ended by an empty line, is one document. A whole file would be cut at
              ``data.max_length`` and could not be split into training and validation.
============  =======================================================================================================

All text is UTF-8, with or without a byte order mark. In a folder, files are read in the order of their paths; hidden
files are passed over, links to folders are not followed, files of unknown kind are passed over with a note. A .txt
file that lies beside structured files is most often a read-me or a licence: it is passed over with a note unless
``data.format`` is text.
"""

import csv
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from fsllm_client.data.rows import Example, Format, Place, detect_format, example_from_record
from fsllm_common.errors import DataInvalid, InputError
from fsllm_common.plan.schema import Data

Record = tuple[Place, Mapping[str, Any]]

_LARGEST_CSV_FIELD = 2**31 - 1  # a C long everywhere; the csv module's own limit of 128 KiB is too small for documents


@dataclass(frozen=True, slots=True)
class Rows:
    """What was read, and notes for the log."""

    examples: tuple[Example, ...]
    files: int
    notes: tuple[str, ...]


def read_rows(path: Path, data: Data) -> Rows:
    """Read every row of a file or folder.

    Raises:
        DataInvalid: something is missing, unreadable, broken, or of the wrong form. Names file and line, not content.
        InputError: a parquet file is there and pyarrow is not (TRAINER_MISSING).

    """
    try:
        files, notes = _files(path, data)
        examples = tuple(example for file in files for example in _examples(file, data))
    except OSError as error:
        place = error.filename if error.filename is not None else path
        raise DataInvalid(f"{place}: can not be read ({error.strerror or type(error).__name__}).") from error
    if not examples:
        raise DataInvalid(f"{path}: holds no rows.")
    return Rows(examples, len(files), notes)


def _files(path: Path, data: Data) -> tuple[list[Path], tuple[str, ...]]:
    known = ", ".join(_READERS)
    if path.is_file():
        if path.suffix.lower() not in _READERS:
            raise DataInvalid(f"{path}: not a kind of file that can be read. Known are {known}.")
        return [path], ()
    if not path.is_dir():
        raise DataInvalid(f"{path}: there is no such file or folder.", cure="Point --data at the site's rows.")
    found = sorted(_walk(path))
    files = [file for file in found if file.suffix.lower() in _READERS]
    ignored = [file for file in found if file.suffix.lower() not in _READERS]
    if data.format != "text" and any(file.suffix.lower() != ".txt" for file in files):
        ignored += [file for file in files if file.suffix.lower() == ".txt"]
        files = [file for file in files if file.suffix.lower() != ".txt"]
    if not files:
        raise DataInvalid(f"{path}: the folder holds no file of a known kind ({known}).")
    return files, (f"{len(ignored)} files in the data folder are not data and were not read.",) if ignored else ()


def _walk(path: Path) -> Iterator[Path]:
    """Yield the files beneath a folder that are not hidden. Raises ``OSError`` for a folder that can not be listed."""

    def fail(error: OSError) -> None:
        raise error  # the default is to pass over it, and data would go missing without a word

    for folder, folders, names in os.walk(path, onerror=fail):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for file in (Path(folder, name) for name in names if not name.startswith(".")):
            if file.is_file() or file.is_symlink():  # not pipes and sockets; a dangling link is to be an error
                yield file


def _examples(file: Path, data: Data) -> Iterator[Example]:
    suffix = file.suffix.lower()
    if suffix == ".txt" and data.format not in ("auto", "text"):
        raise DataInvalid(f"{file}: a .txt file holds plain text, but the plan's data.format is {data.format}.")
    if suffix == ".txt":
        # Paragraphs have no field names that a plan could map.
        yield from (example_from_record(record, "text", Data(), place) for place, record in _read_text(file))
        return
    format_: Format | None = None
    for place, record in _READERS[suffix](file):
        if not isinstance(record, dict):
            raise DataInvalid(f"{place}: not an object with named fields.")
        if format_ is None:
            format_ = detect_format(record, data, place)
        yield example_from_record(record, format_, data, place)


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    """Yield the numbered lines with their ends. Lines are decoded one by one, so that a bad byte names its own line."""
    with file.open("rb") as stream:
        for number, raw in enumerate(stream, start=1):
            try:
                yield number, raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise DataInvalid(f"{file}, line {number}: not UTF-8 text.") from error


def _read_json_lines(file: Path) -> Iterator[Record]:
    for number, line in _lines(file):
        if line.strip():
            place = Place(file, number)
            yield place, _parse(line.rstrip("\r\n"), place)


def _read_json(file: Path) -> Iterator[Record]:
    first = next((line.lstrip() for _, line in _lines(file) if line.strip()), "")
    if not first.startswith("["):
        yield from _read_json_lines(file)
        return
    rows = _parse("".join(line for _, line in _lines(file)), Place(file, 1))
    for number, row in enumerate(rows, start=1):
        yield Place(file, number, "row"), row


def _parse(text: str, place: Place) -> Any:  # noqa: ANN401 - what JSON holds is any type
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = Place(place.file, place.number + error.lineno - 1)
        raise DataInvalid(f"{where}: not valid JSON (at column {error.colno}).") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; brackets nested without end
        raise DataInvalid(f"{place}: not JSON that can be read.") from error


def _read_csv(file: Path) -> Iterator[Record]:
    csv.field_size_limit(_LARGEST_CSV_FIELD)
    reader = csv.reader((line for _, line in _lines(file)), strict=True)
    start = 1
    try:
        header = next(reader, [])
        if len(set(header)) != len(header):
            raise DataInvalid(f"{file}, line 1: two columns of the header have the same name.")
        start = reader.line_num + 1
        for values in reader:
            place = Place(file, start)
            start = reader.line_num + 1
            if not values:
                continue
            if len(values) != len(header):
                raise DataInvalid(f"{place}: {len(values)} fields, where the header has {len(header)}.")
            yield place, dict(zip(header, values, strict=True))
    except csv.Error as error:
        raise DataInvalid(f"{file}, line {start}: not valid CSV.") from error


def _read_parquet(file: Path) -> Iterator[Record]:
    try:
        # Only sites with parquet files need it, and importing it takes tens of MiB.
        import pyarrow as arrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise InputError(
            "TRAINER_MISSING", f"{file}: reading parquet needs pyarrow, which is not installed."
        ) from error
    number = 0
    with file.open("rb") as stream:
        try:
            with parquet.ParquetFile(stream) as table:
                for batch in table.iter_batches():
                    for row in batch.to_pylist():
                        number += 1
                        yield Place(file, number, "row"), row
        except (arrow.ArrowException, OSError, UnicodeDecodeError):  # OSError: a page that does not decompress
            # Without its cause, whose message might quote a value.
            raise DataInvalid(f"{file}: not a parquet file that can be read, or it is damaged.") from None


def _read_text(file: Path) -> Iterator[Record]:
    paragraph: list[str] = []
    start = 1
    for number, line in _lines(file):
        if line.strip():
            if not paragraph:
                start = number
            paragraph.append(line)
        elif paragraph:
            yield Place(file, start), {"text": "".join(paragraph).rstrip()}
            paragraph = []
    if paragraph:
        yield Place(file, start), {"text": "".join(paragraph).rstrip()}


_READERS: Final[dict[str, Callable[[Path], Iterator[Record]]]] = {
    ".jsonl": _read_json_lines,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".pq": _read_parquet,
    ".txt": _read_text,
}
