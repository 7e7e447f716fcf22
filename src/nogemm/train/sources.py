"""Read texts: from a file, a `datasets` dataset, any iterable, or the sample shipped in the package.

    texts("sample")                       the training split of the packaged sample
    texts("notes.txt")                    one text a line
    texts("rows.jsonl.gz", field="body")  one field (or several) of every JSON object
    texts(dataset, field="text")          a datasets.Dataset or IterableDataset
    texts(["a text", "another"])          any iterable of strings
    load_split("sample", "test")          search pairs for evaluation

Everything is read as a stream; nothing is held in memory. Reading order: `texts`, `load_split`, the helpers.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from nogemm.train.errors import DataError

SAMPLE = "sample"
SPLITS = ("train", "validation", "test")
DEFAULT_FIELDS = (("text",), ("short", "long"), ("sentence",), ("content",))
"""Tried in this order when no field is named; every field of the first fitting entry is one text."""


@dataclass(frozen=True)
class SearchPairs:
    """Queries and documents of the same order: `queries[i]` is answered by `documents[i]`."""

    queries: list[str]
    documents: list[str]

    def __len__(self) -> int:
        return len(self.queries)


def texts(
    data: str | Path | Iterable[Any], field: str | Sequence[str] | None = None, split: str | None = "train"
) -> Iterator[str]:
    """Yield the non-empty texts of `data`, in order.

    Args:
        data: "sample", the path of a text file (one text a line) or of a JSONL file, either also gzipped, a `datasets`
            dataset, or an iterable of strings or mappings.
        field: which fields of JSON objects or mappings to take, each as a text of its own; by default `text`, or
            `short` and `long`, or `sentence`, or `content`.
        split: rows that name another split (in a field `split`) or, in Debian package rows without that field, whose
            opening hashes into another one, are left out. None takes every row.
    Raises:
        DataError: no such file, a file that is not text or JSONL, a row without the field.
    """
    names = (field,) if isinstance(field, str) else None if field is None else tuple(field)
    for number, row in enumerate(_rows(data), start=1):
        if isinstance(row, str):
            if row.strip():
                yield row.strip()
        elif isinstance(row, Mapping):
            if split is None or _split_of(row) in (None, split):
                yield from _fields(row, names, number)
        else:
            raise DataError(f"text {number}: expected a string or a mapping, got {type(row).__name__}")


def load_split(path: str | Path, split: str = "test") -> SearchPairs:
    """Return the search pairs of one split: the query is `short`, the document `long`.

    Args:
        path: "sample", a JSONL file with `short` and `long` (and perhaps `split`), or one with `words` and `gloss`,
            whose query is the words joined by ", " and which has no splits: every row is returned.
        split: "train", "validation" or "test".
    Raises:
        DataError: an unknown split, no pairs in it, or rows without these fields.
    """
    if split not in SPLITS:
        raise DataError(f"unknown split {split!r}; known: {', '.join(SPLITS)}")
    pairs = SearchPairs([], [])
    for number, row in enumerate(_rows(path), start=1):
        if not isinstance(row, Mapping):
            raise DataError(f"{path}: search pairs need a JSONL file, line {number} is plain text")
        if "words" in row and "gloss" in row:
            pairs.queries.append(", ".join(row["words"]))
            pairs.documents.append(row["gloss"])
        elif "short" not in row or "long" not in row:
            raise DataError(f"{path}: line {number} has neither `short` and `long` nor `words` and `gloss`")
        elif _split_of(row) in (None, split):
            pairs.queries.append(row["short"])
            pairs.documents.append(row["long"])
    if not pairs.queries:
        raise DataError(f"{path} has no rows in the split {split!r}")
    return pairs


def describe(data: object) -> str:
    """Name a data source for reports and for the check that a resumed run uses the same one."""
    if isinstance(data, (str, Path)):
        return str(data)
    fingerprint = getattr(data, "_fingerprint", None)
    return f"{type(data).__name__}({fingerprint or ''})"


def _rows(data: str | Path | Iterable[Any]) -> Iterator[Any]:
    if isinstance(data, str) and data == SAMPLE:
        with resources.as_file(resources.files("nogemm").joinpath("data/sample.jsonl.gz")) as path:
            yield from _file_rows(path)
    elif isinstance(data, (str, Path)):
        yield from _file_rows(Path(data))
    elif isinstance(data, Mapping):
        raise DataError(
            f"data has several splits ({', '.join(map(str, data))}): pass one of them, such as data['train']"
        )
    else:
        yield from data


def _file_rows(path: Path) -> Iterator[Any]:
    if not path.is_file():
        raise DataError(f"no such data file: {path} (or pass {SAMPLE!r} for the packaged sample)")
    is_json = any(suffix in (".jsonl", ".json", ".ndjson") for suffix in path.suffixes)
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                yield _json_row(path, number, line) if is_json else line
    except (UnicodeDecodeError, EOFError, gzip.BadGzipFile) as error:
        raise DataError(f"{path} cannot be read as UTF-8 text: {error}") from error


def _json_row(path: Path, number: int, line: str) -> Any:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}: line {number} is not JSON ({error.msg}); expected one object a line") from error
    if not isinstance(row, (dict, str)):
        raise DataError(f"{path}: line {number} is neither a JSON object nor a string")
    return row


def _fields(row: Mapping[str, Any], names: tuple[str, ...] | None, number: int) -> Iterator[str]:
    if names is None:
        names = next((entry for entry in DEFAULT_FIELDS if all(name in row for name in entry)), None)
        if names is None:
            raise DataError(
                f"row {number} has the fields {', '.join(map(str, row))}: name the one that holds the text (field=...)"
            )
    for name in names:
        if name not in row:
            raise DataError(f"row {number} has no field {name!r}; it has: {', '.join(map(str, row))}")
        value = row[name]
        if value is not None and not isinstance(value, str):
            raise DataError(f"row {number}: field {name!r} is {type(value).__name__}, not text")
        if value and value.strip():
            yield value.strip()


def _split_of(row: Mapping[str, Any]) -> str | None:
    """Return the split a row names or, for Debian package rows, the one its opening hashes into."""
    if "split" in row:
        return str(row["split"])
    if not {"name", "section", "short", "long"} <= row.keys():
        return None
    opening = re.sub(r"\d", "", str(row["long"])[:120].lower())
    group = int(hashlib.sha1(opening.encode()).hexdigest()[:8], 16) % 100
    return "test" if group < 5 else "validation" if group < 10 else "train"
