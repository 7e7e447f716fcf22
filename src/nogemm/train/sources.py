"""Texts, search pairs and labelled texts: from a file, a `datasets` dataset, any iterable, or the packaged sample.

    texts("sample")                       the training split of the packaged sample
    texts("notes.txt")                    one text a line
    texts("rows.jsonl.gz", field="body")  one field (or several) of every JSON object
    texts("rows.csv", field="body")       one column (or several)
    texts(dataset, field="text")          a datasets.Dataset or IterableDataset
    texts(["a text", "another"])          any iterable of strings
    text_pairs("rows.jsonl", ("query", "document"))   two fields that a model reads together
    load_split("sample", "test")          search pairs for evaluation
    load_labels("rows.csv")               labelled texts for evaluation

Files are read by `reader.py`; `texts` and `text_pairs` hold nothing in memory.
Reading order: `texts`, `text_pairs`, `load_split`, `load_labels`, the helpers.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nogemm.train.errors import DataError
from nogemm.train.reader import SAMPLE, Row, read

SPLITS = ("train", "validation", "test")
DEFAULT_FIELDS = (("text",), ("short", "long"), ("sentence",), ("content",))
"""Tried in this order when no field is named; every field of the first fitting entry is one text."""
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")


@dataclass(frozen=True)
class SearchPairs:
    """Queries and documents of the same order: `queries[i]` is answered by `documents[i]`."""

    queries: list[str]
    documents: list[str]

    def __len__(self) -> int:
        return len(self.queries)


@dataclass(frozen=True)
class Labelled:
    """A text, its label (a number or a name), and where it stands in its file."""

    text: str
    label: int | str
    where: str

    def class_of(self, classes: int, names: Mapping[str, int]) -> int:
        """Return the number of the label's class, of `classes`; `names` are the model's own.

        Raises:
            DataError: the label is neither a name nor the number of a class.
        """
        if str(self.label) in names:  # a file of JSON may hold as a number what the model's names write as a word
            return names[str(self.label)]
        number = int(self.label) if isinstance(self.label, int) or self.label.strip().isdecimal() else -1
        if not 0 <= number < classes:
            known = ", ".join(list(names)[:10]) + (", ..." if len(names) > 10 else "")
            raise DataError(
                f"{self.where}, field 'label': label {self.label!r} is not one of the model's {classes}: "
                f"0 to {classes - 1}, or by name {known}"
            )
        return number


def texts(
    data: str | Path | Iterable[Any], field: str | Sequence[str] | None = None, split: str | None = "train"
) -> Iterator[str]:
    """Yield the non-empty texts of `data`, in order; a field that is null is left out as an empty one is.

    Args:
        data: "sample", the path of a text file (one text a line), of a JSONL file or of a CSV file with a header row,
            each also gzipped, a `datasets` dataset, or an iterable of strings or mappings.
        field: which fields of JSON objects, CSV rows or mappings to take, each as a text of its own; by default `text`,
            or `short` and `long`, or `sentence`, or `content`.
        split: rows that name another split (in a field `split`) or, in Debian package rows without that field, whose
            opening hashes into another one, are left out. None takes every row.
    Raises:
        DataError: no such file, one that is not UTF-8, not JSON or not CSV, a row without the field or with something
            else than text in it, or no text at all. The message names file, line and field.
    """
    names = (field,) if isinstance(field, str) else None if field is None else tuple(field)
    found, left_out = False, 0
    for row in read(data):
        if isinstance(row.value, str):
            some = [row.checked(row.value)]
        elif not _within(row, split):
            left_out += 1
            continue
        else:
            chosen = names or _default_fields(row)
            some = [row.text(name) for name in chosen if row.field(name) is not None]
        for text in some:
            if text.strip():
                found = True
                yield text.strip()
    if not found:
        raise DataError(_empty(data, "text", split, left_out))


def text_pairs(
    data: str | Path | Iterable[Any], fields: Sequence[str], split: str | None = "train"
) -> Iterator[tuple[str, str]]:
    """Yield two fields of every row as a pair that a model reads together, such as a query and a document.

    Args:
        data, split: as in `texts`; every row needs named fields.
        fields: the first and the second text's.
    Raises:
        DataError: as `texts`; a null is refused, too, because its partner would stand alone.
    """
    first, second = fields
    found, left_out = False, 0
    for row in read(data):
        if _within(row, split):
            found = True
            yield row.text(first).strip(), row.text(second).strip()
        else:
            left_out += 1
    if not found:
        raise DataError(_empty(data, "pair", split, left_out))


def load_split(path: str | Path, split: str = "test") -> SearchPairs:
    """Return the search pairs of one split: the query is `short`, the document `long`.

    Args:
        path: "sample", a JSONL or CSV file with `short` and `long` (and perhaps `split`), or a JSONL file with `words`
            and `gloss`, whose query is the words joined by ", " and which has no splits: every row is returned.
        split: "train", "validation" or "test".
    Raises:
        DataError: an unknown split, no pairs in it, or rows without text in these fields.
    """
    if split not in SPLITS:
        raise DataError(f"unknown split {split!r}; known: {', '.join(SPLITS)}")
    pairs = SearchPairs([], [])
    for row in read(path):
        value = row.fields()
        if "words" in value and "gloss" in value:
            words = value["words"]
            if not isinstance(words, list):
                raise DataError(f"{row.where}, field 'words': {type(words).__name__}, not a list of words")
            pairs.queries.append(", ".join(row.checked(word, ", field 'words'") for word in words))
            pairs.documents.append(row.text("gloss"))
        elif "short" not in value or "long" not in value:
            raise DataError(f"{row.where} has neither `short` and `long` nor `words` and `gloss`")
        elif _within(row, split):
            pairs.queries.append(row.text("short"))
            pairs.documents.append(row.text("long"))
    if not pairs.queries:
        raise DataError(f"{path} has no rows in the split {split!r}")
    return pairs


def load_labels(path: str | Path, split: str = "test") -> list[Labelled]:
    """Return the rows of a JSONL or CSV file with `text` and `label` (and perhaps `split`).

    Raises:
        DataError: no such file, no row in the split, or a row without text and label.
    """
    if str(path) == SAMPLE:
        raise DataError("the packaged sample has no labels: name a JSONL or CSV file with text and label in each row")
    rows: list[Labelled] = []
    for row in read(path):
        if _within(row, split):
            text, label = row.text("text"), row.field("label")
            if isinstance(label, bool) or not isinstance(label, (int, str)):
                kind = "null" if label is None else f"{label!r}"
                raise DataError(f"{row.where}, field 'label': {kind}, neither a whole number nor a name")
            rows.append(Labelled(text, label, row.where))
    if not rows:
        raise DataError(f"{path} has no rows in the split {split!r}")
    return rows


def is_held_out(text: str, share: float) -> bool:
    """Say by its hash whether a text is held out: the same text always is, wherever it stands and however often."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") < share * 2**64


def is_hub_name(data: object) -> bool:
    """Tell the name of a hub's data set, OWNER/NAME or OWNER/NAME:CONFIG, from a file."""
    return isinstance(data, str) and not Path(data).exists() and _HUB_NAME.fullmatch(data) is not None


def describe(data: object) -> str:
    """Name a data source for reports."""
    if isinstance(data, (str, Path)):
        return str(data)
    fingerprint = getattr(data, "_fingerprint", None)
    return f"{type(data).__name__}({fingerprint or ''})"


def _empty(data: object, what: str, split: str | None, left_out: int) -> str:
    name = data if isinstance(data, (str, Path)) else "the data"
    return f"{name} holds no {what}" + (f" of the split {split!r}, only {left_out:,} other rows" if left_out else "")


def _default_fields(row: Row) -> tuple[str, ...]:
    value = row.fields()
    names = next((entry for entry in DEFAULT_FIELDS if all(name in value for name in entry)), None)
    if names is None:
        raise DataError(
            f"{row.where} has the fields {', '.join(map(str, value))}: name the one that holds the text (field=...)"
        )
    return names


def _within(row: Row, split: str | None) -> bool:
    return split is None or split_of(row.fields()) in (None, split)


def split_of(row: Mapping[str, Any]) -> str | None:
    """Return the split a row names or, for Debian package rows, the one its opening hashes into."""
    if "split" in row:
        return str(row["split"]) if row["split"] else None
    if not {"name", "section", "short", "long"} <= row.keys():
        return None
    opening = re.sub(r"\d", "", str(row["long"])[:120].lower())
    group = int(hashlib.sha1(opening.encode(errors="replace")).hexdigest()[:8], 16) % 100
    return "test" if group < 5 else "validation" if group < 10 else "train"
