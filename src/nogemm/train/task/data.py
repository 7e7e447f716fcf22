"""Rows with texts and labels, in the splits that a run trains on, chooses on and is tested on.

Every row is read once and checked before anything is tokenised or trained. Reading order: `read_data`, `Examples`,
`Labels`.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nogemm.errors import ConfigError
from nogemm.train.errors import DataError
from nogemm.train.reader import Row, read
from nogemm.train.sources import Labelled, describe, is_held_out, split_of
from nogemm.train.task.hub import Splits, hub_splits
from nogemm.train.task.options import FinetuneOptions

PARTS = ("train", "validation", "test")


@dataclass
class Examples:
    """Rows of one split.

    Attributes:
        texts, seconds: one text a row, or two.
        labels: a word, a number, or nothing a row.
        where: where each row stands, for messages.
        left_out: rows without a text.
    """

    texts: list[str] = field(default_factory=list)
    seconds: list[str] = field(default_factory=list)
    labels: list[str | float] = field(default_factory=list)
    where: list[str] = field(default_factory=list)
    left_out: int = 0

    def __len__(self) -> int:
        return len(self.texts)

    def identity(self) -> str:
        """Return a hash of all that is in the rows."""
        digest = hashlib.sha256()
        for part in (self.texts, self.seconds, self.labels):
            for value in part:
                digest.update(json.dumps(value).encode() + b"\n")
            digest.update(b"\f")
        return digest.hexdigest()

    def first(self, count: int | None) -> Examples:
        """Return the first rows."""
        cut = slice(count)
        return Examples(self.texts[cut], self.seconds[cut], self.labels[cut], self.where[cut], self.left_out)

    def sources(self) -> Iterator[str] | Iterator[tuple[str, str]]:
        """Yield what a tokenizer reads: texts, or pairs of texts."""
        return zip(self.texts, self.seconds, strict=True) if self.seconds else iter(self.texts)


@dataclass(frozen=True)
class Labels:
    """The classes of a run, by number.

    Attributes:
        names: of the classes.
        known: number of every word that a row may have for a label.
    """

    names: tuple[str, ...]
    known: Mapping[str, int]

    def numbers(self, rows: Examples) -> list[int]:
        """Return the class of every row.

        Raises:
            DataError: a label that no class has.
        """
        for label, where in zip(rows.labels, rows.where, strict=True):
            if label not in self.known:
                raise DataError(
                    f"{where}: the label {label!r} is not one of the {len(self.names)} that the model learns: "
                    f"{_listed(self.names)}"
                )
        return [self.known[str(label)] for label in rows.labels]

    @classmethod
    def of(cls, rows: Examples) -> Labels:
        """Number the labels of training rows: by value where all are whole numbers, else by name.

        Raises:
            DataError: there is one label alone.
        """
        words = {str(label) for label in rows.labels}
        if len(words) < 2:
            raise DataError(f"all {len(rows):,} rows to train on have the label {words.pop()!r}: nothing to tell apart")
        whole = all(word.lstrip("-").isdecimal() for word in words)
        names = tuple(sorted(words, key=(lambda word: (int(word), word)) if whole else None))
        return cls(names, {name: number for number, name in enumerate(names)})

    @classmethod
    def of_model(cls, config: Any, rows: Examples) -> Labels:
        """Take the classes of a model's own head.

        Names that say nothing (LABEL_0) are replaced by the data's, in order, where their number is right.

        Raises:
            ConfigError: a label is not one of the head's.
        """
        count, names = int(config.num_labels), dict(getattr(config, "label2id", None) or {})
        known: dict[str, int] = {}
        try:
            for label, where in {
                str(label): where for label, where in zip(rows.labels, rows.where, strict=True)
            }.items():
                known[label] = Labelled("", label, where).class_of(count, names)
        except DataError as error:
            nameless = all(str(name).startswith("LABEL_") for name in names)
            if nameless and len(set(map(str, rows.labels))) == count:
                return cls.of(rows)
            raise ConfigError(
                f'finetune: the model\'s head does not fit the data: {error}. head="new" (--option head=new) gives it '
                "one for the data's labels"
            ) from error
        by_number = {number: str(name) for name, number in names.items()}
        return cls(tuple(by_number.get(number, str(number)) for number in range(count)), names | known)


def read_data(options: FinetuneOptions, data: Any, validation: Any = None, test: Any = None) -> dict[str, Examples]:
    """Read every row, and sort the rows into what is trained on, chosen on and tested on.

    Rows of `data` that name a split (a field `split`, a data set's own, that of Debian's packages) go there, unless
    `validation` or `test` name other rows. Without any row to choose on, `validation_share` of the rows are held out,
    by the hash of their texts, so that a text that stands twice is never on both sides.

    Returns:
        {"train", "validation", and "test" if there is one}.
    Raises:
        DataError: no such file, rows that cannot be read, too few of them, or labels that are none.
    """
    found = _rows(options, data, None)
    for name, source in (("validation", validation), ("test", test)):
        if source is not None:
            found[name] = _rows(options, source, name)[name]
    if not len(found["train"]):
        raise DataError(f"{describe(data)} holds no row to train on" + _only(found))
    if not len(found["validation"]):
        if validation is not None:
            raise DataError(f"{describe(validation)} holds no row to validate on")
        found["train"], found["validation"] = _held_out(found["train"], options.validation_share)
    if test is not None and not len(found["test"]):
        raise DataError(f"{describe(test)} holds no row to test on")
    if len(found["train"]) < options.batch:
        raise DataError(
            f"the data holds {len(found['train']):,} rows to train on, and a batch takes {options.batch}: give more "
            "rows, or a smaller batch"
        )
    if options.task == "embed" and len(found["validation"]) < 2:
        raise DataError("one pair alone cannot be searched for: give more rows to validate on")
    return {name: found[name] for name in PARTS if len(found[name])}


def _rows(options: FinetuneOptions, source: Any, only: str | None) -> dict[str, Examples]:
    """Read one source; `only`: whatever split a row names, it counts as this one, or is another's and left out."""
    found = {name: Examples() for name in PARTS}
    splits = hub_splits(source)
    for split, row in _split_rows(splits, source):
        name = split or only or "train"
        if name not in found or (only is not None and name != only):
            continue
        _add(found[name], row, options, splits)
    if only is not None and splits is not None and not len(found[only]):
        raise DataError(f"{describe(source)} has no split {only!r} with labels")
    return found


def _split_rows(splits: Splits | None, source: Any) -> Iterator[tuple[str | None, Row]]:
    if splits is None:
        for row in read(source):
            yield split_of(row.fields()), row
        return
    for name, rows in splits.rows.items():
        for row in read(rows):
            yield name, Row(row.value, f"{name} split", row.number)


def _add(rows: Examples, row: Row, options: FinetuneOptions, splits: Splits | None) -> None:
    """Check a row and take it; one without a text is left out and counted."""
    text, text2 = fields_of(options, splits)
    texts = [row.text(name).strip() for name in (text, text2) if name is not None]
    if not all(texts):
        rows.left_out += 1
        return
    if options.task != "embed":
        name = options.label or "label"
        value = row.field(name)
        rows.labels.append(_number(row, name, value) if options.task == "regress" else _word(row, name, value))
    rows.texts.append(texts[0])
    if text2 is not None:
        rows.seconds.append(texts[1])
    rows.where.append(row.where)


def fields_of(options: FinetuneOptions, splits: Splits | None = None) -> tuple[str, str | None]:
    """Return which fields of a row hold its texts."""
    text = options.text or (splits.text if splits else None) or "text"
    if options.task == "classify":
        return text, None
    text2 = options.text2 or (splits.text2 if splits else None)
    return text, text2 or (None if options.task == "regress" else "text2")


def _word(row: Row, name: str, value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, (int, str)) or not str(value).strip():
        kind = "null" if value is None else repr(value)
        raise DataError(f"{row.where}, field {name!r}: {kind}, neither a whole number nor a name")
    return str(value).strip()


def _number(row: Row, name: str, value: Any) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise DataError(f"{row.where}, field {name!r}: {value!r} is not a number")
    return number


def _held_out(rows: Examples, share: float) -> tuple[Examples, Examples]:
    """Deal rows by the hash of their texts to training and validation."""
    parts = (Examples(left_out=rows.left_out), Examples())
    columns: Sequence[str] = [name for name in ("texts", "seconds", "labels", "where") if getattr(rows, name)]
    for index, text in enumerate(rows.texts):
        words = text + ("\0" + rows.seconds[index] if rows.seconds else "")
        part = parts[is_held_out(words, share)]
        for name in columns:
            getattr(part, name).append(getattr(rows, name)[index])
    if not len(parts[1]) or not len(parts[0]):
        raise DataError(
            f"{len(rows):,} rows leave none to validate on (validation_share={share}): give more rows, a larger share, "
            "or validation rows of your own"
        )
    return parts


def _only(found: Mapping[str, Examples]) -> str:
    others = [f"{len(rows):,} of the split {name!r}" for name, rows in found.items() if len(rows)]
    empty = sum(rows.left_out for rows in found.values())
    others += [f"{empty:,} without a text"] if empty else []
    return f", only {' and '.join(others)}" if others else ""


def _listed(names: Sequence[str], most: int = 10) -> str:
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def counted(rows: Examples, names: Sequence[str]) -> dict[str, int]:
    """Return how many rows have each label."""
    found = Counter(map(str, rows.labels))
    return {name: found.get(name, 0) for name in names}
