"""Data sets of the hub, GLUE among them, by name: every split of one, read by `datasets`.

glue/sst2, glue/mnli, ...            with the fields, the metric's kind and the validation split of each task
OWNER/NAME, OWNER/NAME:CONFIG        any other data set; the fields are the caller's to name
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from nogemm.train.errors import DataError
from nogemm.train.sources import is_hub_name

GLUE_HOME = "nyu-mll/glue"
GLUE: dict[str, tuple[str, str | None]] = {
    "cola": ("sentence", None),
    "sst2": ("sentence", None),
    "mrpc": ("sentence1", "sentence2"),
    "qqp": ("question1", "question2"),
    "stsb": ("sentence1", "sentence2"),
    "mnli": ("premise", "hypothesis"),
    "qnli": ("question", "sentence"),
    "rte": ("sentence1", "sentence2"),
    "wnli": ("sentence1", "sentence2"),
}
"""The text fields of every task of GLUE; the label's is `label`."""
NO_LABEL = -1  # what GLUE writes where the labels are not public


@dataclass(frozen=True)
class Splits:
    """Rows by split, and what is known of them.

    Attributes:
        rows: {"train", "validation", "test"}, those that there are; mappings of fields.
        text, text2: the fields that hold texts, where the data set is known.
        names: of the numbers that stand for labels, by field.
    """

    rows: Mapping[str, Iterable[Any]]
    text: str | None = None
    text2: str | None = None
    names: Mapping[str, list[str]] = field(default_factory=dict)


def hub_splits(data: object) -> Splits | None:
    """Open a data set of the hub by name, or take the splits of one that was opened; None: `data` is something else.

    Raises:
        DataError: no such task of GLUE, `datasets` is not installed, or it cannot open the data set.
    """
    if isinstance(data, Mapping):
        return _of_splits(data)
    if not is_hub_name(data):
        return None
    name, _, config = str(data).partition(":")
    if name.partition("/")[0] != "glue":
        return _of_splits(_loaded(str(data), name, config or None))
    task = name.partition("/")[2]
    if task not in GLUE:
        raise DataError(f"{data}: no such task of GLUE; they are {', '.join(GLUE)}")
    text, text2 = GLUE[task]
    found = _of_splits(_loaded(str(data), GLUE_HOME, task), hidden="label")
    return Splits(found.rows, text, text2, found.names)


def _loaded(said: str, name: str, config: str | None) -> Mapping[Any, Any]:
    if importlib.util.find_spec("datasets") is None:
        raise DataError(f"{said}: no such file, and for a data set of the hub: pip install 'nogemm[finetune]'")
    import datasets

    try:
        return datasets.load_dataset(name, config)
    except Exception as error:  # what the hub's libraries raise has no common base
        raise DataError(
            f"{said}: no such file, and the hub's data set {name} cannot be opened: {error}. It is fetched where there "
            "is a network, and read from its cache afterwards; without one give a JSONL or CSV file"
        ) from error


def _of_splits(data: Mapping[Any, Any], hidden: str | None = None) -> Splits:
    """Sort the splits of a data set into ours; of several for validation or testing the first counts.

    Args:
        hidden: a field whose -1 says that the row's label is not public, besides those that have named classes.
    """
    rows: dict[str, Iterable[Any]] = {}
    names: dict[str, list[str]] = {}
    for split, part in data.items():
        ours = next((name for name in ("train", "validation", "test") if str(split).startswith(name)), None)
        if ours is None or ours in rows:
            continue
        known = {
            column: list(feature.names)
            for column, feature in (getattr(part, "features", None) or {}).items()
            if getattr(feature, "names", None)
        }
        names |= known
        rows[ours] = list(_labelled(part, known, {*known, *([hidden] if hidden else [])}))
    if "train" not in rows:
        raise DataError(f"the data set has no split to train on; it has {', '.join(map(str, data)) or 'none'}")
    return Splits({name: part for name, part in rows.items() if part}, names=names)


def _labelled(part: Iterable[Any], known: Mapping[str, list[str]], hidden: set[str]) -> Iterator[Any]:
    """Write labels by their names, and leave out rows whose label is not public."""
    for row in part:
        if any(row[column] == NO_LABEL for column in hidden):
            continue
        words = {column: names[row[column]] for column, names in known.items() if row[column] is not None}
        yield {**row, **words} if words else row
