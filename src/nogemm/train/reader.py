"""The one reader of rows: text, JSONL and CSV files, each also gzipped, `datasets` datasets, iterables, the sample.

    notes.txt     one text a line
    rows.jsonl    one JSON object (or one JSON string) a line; also .ndjson and .json
    rows.csv      a header row that names the columns, then one row each; a quoted field may hold newlines

Every file is UTF-8. A byte order mark is dropped, blank lines are skipped, and lines may end in LF, CRLF or CR. Rows
come as a stream, and each knows where it stands, so that whoever refuses one can name file, line and field.
Reading order: `read`, `Row`, the formats.
"""

from __future__ import annotations

import csv
import gzip
import io
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, cast

from nogemm.files import parse_json
from nogemm.train.errors import DataError

SAMPLE = "sample"
JSON_SUFFIXES = (".jsonl", ".json", ".ndjson")
LONGEST_CELL = 2**24
"""Characters in a field of a CSV file; a longer one is a quote that was never closed."""
_NOT_UTF8 = re.compile("[\udc80-\udcff]")  # what Python's "surrogateescape" makes of a byte that is not UTF-8
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Row:
    """One row and where it stands.

    Attributes:
        value: a text, or a mapping from field to value.
        source: the file's name; "" for rows that are not from a file.
        number: of the line on which the row starts, or of the row, from 1 on.
    """

    value: str | Mapping[str, Any]
    source: str
    number: int

    @property
    def where(self) -> str:
        """Say where the row stands."""
        return f"{self.source}: line {self.number}" if self.source else f"row {self.number}"

    def fields(self) -> Mapping[str, Any]:
        """Return the row's fields.

        Raises:
            DataError: the row is plain text.
        """
        if isinstance(self.value, str):
            raise DataError(f"{self.where} is plain text: rows with named fields are needed (JSONL or CSV)")
        return self.value

    def field(self, name: str) -> Any:
        """Return the value of a field.

        Raises:
            DataError: there is no such field.
        """
        row = self.fields()
        if name not in row:
            header = "; the first line of a CSV file names its columns" if _format(Path(self.source)) == "csv" else ""
            raise DataError(f"{self.where} has no field {name!r}; it has: {', '.join(map(str, row))}{header}")
        return row[name]

    def text(self, name: str) -> str:
        """Return the text in a field.

        Raises:
            DataError: there is no such field, or it holds no text.
        """
        return self.checked(self.field(name), f", field {name!r}")

    def checked(self, value: Any, what: str = "") -> str:
        """Return `value` if it is text that can be written as UTF-8; `what` goes into the message.

        Raises:
            DataError: it is null, of another type, or holds one half of a surrogate pair.
        """
        if not isinstance(value, str):
            kind = "null" if value is None else type(value).__name__
            raise DataError(f"{self.where}{what}: {kind}, not text")
        if not value.isascii() and _SURROGATE.search(value):
            raise DataError(f"{self.where}{what}: half of a surrogate pair (a character that was cut in two), not text")
        return value


def read(data: str | Path | Iterable[Any]) -> Iterator[Row]:
    """Yield the rows of a file, of "sample", or of an iterable of strings or mappings.

    Raises:
        DataError: no such file, a file or row that cannot be read, or data with several splits.
    """
    if isinstance(data, str) and data == SAMPLE:
        with sample_file() as path:
            yield from _file_rows(path, SAMPLE)
    elif isinstance(data, (str, Path)):
        yield from _file_rows(Path(data), str(data))
    elif isinstance(data, Mapping):
        raise DataError(
            f"data has several splits ({', '.join(map(str, data))}): pass one of them, such as data['train']"
        )
    elif not isinstance(data, Iterable) and not hasattr(data, "__getitem__"):
        raise DataError(f"data must be a file, {SAMPLE!r} or an iterable of texts, got {type(data).__name__}")
    else:
        for number, value in enumerate(data, start=1):
            if not isinstance(value, (str, Mapping)):
                raise DataError(f"row {number}: expected a string or a mapping, got {type(value).__name__}")
            yield Row(cast("str | Mapping[str, Any]", value), "", number)


def sample_file() -> Any:
    """Return a context that gives the path of the packaged sample."""
    return resources.as_file(resources.files("nogemm").joinpath("data/sample.jsonl.gz"))


def _file_rows(path: Path, name: str) -> Iterator[Row]:
    if not path.is_file():
        raise DataError(f"no such data file: {path} (or pass {SAMPLE!r} for the packaged sample)")
    rows = {"csv": _csv_rows, "jsonl": _json_rows, "text": _text_rows}[_format(path)]
    try:
        with gzip.open(path) if path.suffix.lower() == ".gz" else open(path, "rb") as file:
            yield from rows(file, name)
    except (EOFError, OSError, zlib.error) as error:  # gzip's own complaint is an OSError
        raise DataError(f"{name} cannot be read: {error}") from error


def _format(path: Path) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    last = next((suffix for suffix in reversed(suffixes) if suffix != ".gz"), "")
    return "csv" if last == ".csv" else "jsonl" if last in JSON_SUFFIXES else "text"


def _lines(file: Any, name: str, newline: str | None = None) -> Iterator[str]:
    """Yield decoded lines without byte order marks; a mark also stands where files were joined."""
    text = io.TextIOWrapper(file, encoding="utf-8", errors="surrogateescape", newline=newline)
    for number, line in enumerate(text, start=1):
        if not line.isascii() and _NOT_UTF8.search(line):
            raise DataError(f"{name}: line {number} is not UTF-8 text: save the file as UTF-8")
        yield line.lstrip("\ufeff")


def _text_rows(file: Any, name: str) -> Iterator[Row]:
    for number, line in enumerate(_lines(file, name), start=1):
        if line.strip():
            yield Row(line.strip(), name, number)


def _json_rows(file: Any, name: str) -> Iterator[Row]:
    for number, line in enumerate(_lines(file, name), start=1):
        if not line.strip():
            continue
        try:
            value = parse_json(line)
        except ValueError as error:  # its own text counts lines from this one on
            reason = getattr(error, "msg", error)
            raise DataError(f"{name}: line {number} is not JSON ({reason}); expected one object a line") from error
        if not isinstance(value, (dict, str)):
            raise DataError(f"{name}: line {number} is neither a JSON object nor a string")
        yield Row(value, name, number)


def _csv_rows(file: Any, name: str) -> Iterator[Row]:
    csv.field_size_limit(max(csv.field_size_limit(), LONGEST_CELL))
    reader = csv.reader(_lines(file, name, newline=""), strict=True)
    header: list[str] = []
    start = 1
    try:
        for cells in reader:
            number, start = start, reader.line_num + 1
            if not any(cell.strip() for cell in cells):
                continue
            if not header:
                header = [cell.strip() for cell in cells]
                twice = sorted({column for column in header if header.count(column) > 1})
                if twice:
                    raise DataError(f"{name}: line {number}, the header row, names {twice[0]!r} more than once")
                continue
            if len(cells) != len(header):
                raise DataError(f"{name}: line {number} has {len(cells)} fields, the header row has {len(header)}")
            yield Row(dict(zip(header, cells, strict=True)), name, number)
    except csv.Error as error:
        raise DataError(
            f"{name}: line {start} is not CSV ({error}): is a quote missing, or one inside a field not doubled?"
        ) from error
