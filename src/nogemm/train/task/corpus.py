"""A run's rows as tokens, the classes or numbers that belong to them, and which rows each batch holds.

Batches are numbered over all epochs and all processes: number k holds the same rows whoever asks for it. So a run's
data depend on its seed alone, not on how often it was stopped or how many processes share it.

Legend: N rows of a part, B rows of a batch, L tokens of the longest row.
Reading order: `open_corpus`, `Part`, `Order`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from nogemm.train.data import Batches, TokenFile, hash_words, tokenise
from nogemm.train.errors import DataError
from nogemm.train.feed import forget
from nogemm.train.identity import tokenizer_identity
from nogemm.train.task.data import Examples
from nogemm.train.task.options import FinetuneOptions

POOL = 50
"""Batches whose rows are sorted by length together, so that little of a batch is padding."""


class Part:
    """Tokenised rows of one split.

    Args:
        files: tokens of the texts; of "embed" those of the first texts and of the second ones, else of both together.
        targets: classes (int64) or numbers (float32) of the rows, [N]; None: there are none.
        pad_id: of the tokenizer.
    """

    def __init__(self, files: Sequence[TokenFile], targets: np.ndarray | None, pad_id: int) -> None:
        self.files, self.targets = list(files), targets
        self.lengths_N = np.sum([file.lengths(np.arange(len(file))) for file in self.files], axis=0)
        self._padders = [Batches(file, batch_tokens=1, seed=0, pad_id=pad_id) for file in self.files]

    def __len__(self) -> int:
        return len(self.lengths_N)

    def inputs(self, rows: np.ndarray, column: int = 0) -> dict[str, Tensor]:
        """Return the model's inputs for these rows, padded behind to the longest: each [B, L]."""
        batch = self._padders[column].padded(rows)
        found = {"input_ids": batch.ids, "attention_mask": batch.mask}
        return found if batch.types is None else {**found, "token_type_ids": batch.types}

    def cut(self, rows: np.ndarray, size: int, column: int = 0) -> Iterator[np.ndarray]:
        """Yield batches of these rows, longest first, so that memory peaks at once."""
        order = np.argsort(-self.files[column].lengths(rows), kind="stable")
        for start in range(0, len(rows), size):
            yield rows[order[start : start + size]]


class Order:
    """Which rows of training each batch holds.

    Rows are drawn without replacement within an epoch. An epoch ends within a batch where its rows are no multiple of
    the batch, and the next one fills it. Rows of similar length share a batch.

    Args:
        lengths_N: tokens of each row.
        batch: rows of a batch.
        seed: another one gives another order.
        apart: of "embed" the numbers of each row's texts, [N] each; rows that share one are kept out of one batch, in
            which each would be taken for a wrong answer of the other, as far as the data allow. An epoch then leaves
            out the rows behind its last whole batch.
    """

    def __init__(self, lengths_N: np.ndarray, batch: int, seed: int, apart: Sequence[np.ndarray] = ()) -> None:
        self.lengths_N, self.batch, self.seed, self.apart = lengths_N, batch, seed, tuple(apart)
        count = len(lengths_N)
        self.epoch_rows = count // batch * batch if self.apart else count
        self._epochs: dict[int, np.ndarray] = {}

    def rows(self, step: int) -> np.ndarray:
        """Return the rows of batch `step`, [B]."""
        numbers = np.arange(step * self.batch, (step + 1) * self.batch)
        epochs = numbers // self.epoch_rows
        parts = [self.epoch(e)[numbers[epochs == e] % self.epoch_rows] for e in range(epochs[0], epochs[-1] + 1)]
        return np.concatenate(parts)

    def epoch(self, number: int) -> np.ndarray:
        """Return the rows of an epoch in their order."""
        if number not in self._epochs:
            self._epochs = {key: rows for key, rows in self._epochs.items() if key == number - 1}
            source = np.random.default_rng(hash_words(self.seed, number))
            rows = source.permutation(len(self.lengths_N))
            self._epochs[number] = self._separated(rows) if self.apart else self._by_length(rows, number, source)
        return self._epochs[number]

    def _by_length(self, rows: np.ndarray, number: int, source: np.random.Generator) -> np.ndarray:
        """Sort rows by length within pools of whole batches; batches begin where the last epoch's last one ends."""
        head = -number * self.epoch_rows % self.batch
        whole = max(0, len(rows) - head) // self.batch
        body = rows[head : head + whole * self.batch]
        batches: list[np.ndarray] = []
        for start in range(0, len(body), POOL * self.batch):
            pool = body[start : start + POOL * self.batch]
            pool = pool[np.argsort(self.lengths_N[pool], kind="stable")]
            batches += np.split(pool, len(pool) // self.batch)
        mixed = [batches[i] for i in source.permutation(len(batches))]
        return np.concatenate([rows[:head], *mixed, rows[head + whole * self.batch :]])

    def _separated(self, rows: np.ndarray) -> np.ndarray:
        """Fill batch by batch with the next rows that share no text with it; what never fits comes last, as it is."""
        waiting = deque(int(row) for row in rows)
        out: list[int] = []
        while waiting:
            batch: list[int] = []
            seen: set[int] = set()
            passed: list[int] = []
            while waiting and len(batch) < self.batch:
                row = waiting.popleft()
                texts = {int(numbers[row]) for numbers in self.apart}
                if seen & texts:
                    passed.append(row)
                else:
                    batch.append(row)
                    seen |= texts
            waiting.extendleft(reversed(passed))
            if len(batch) < self.batch:  # nothing left fits: the rest is no better in any other order
                return np.array([*out, *batch, *waiting])
            out += batch
        return np.array(out)


@dataclass(frozen=True)
class Corpus:
    """A run's tokenizer, its parts, and its order.

    Attributes:
        parts: "train", "validation", and "test" if there is one.
        order: of the rows to train on.
    """

    tokenizer: Any
    parts: dict[str, Part]
    order: Order


def open_corpus(
    options: FinetuneOptions,
    directory: Path,
    examples: Mapping[str, Examples],
    targets: Mapping[str, np.ndarray | None],
    tokenizer: Any,
    max_length: int,
    resume: bool = False,
) -> Corpus:
    """Tokenise into `directory`, or open what an earlier part of the same run left there.

    Args:
        targets: of each part, classes or numbers.
        max_length: of a text in tokens, which tokenizer and model allow.
    Raises:
        DataError: other data than the run began with, or a text that gives no token.
    """
    columns = ("texts", "seconds") if options.task == "embed" else ("both",)
    names = {"train": "tokens", "validation": "validation", "test": "test"}
    if not resume:
        forget(directory, [f"{names[part]}{suffix}" for part in names for suffix in ("", "-2")])
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    common = {"tokenizer": tokenizer_identity(tokenizer), "task": options.task}
    parts: dict[str, Part] = {}
    for part, rows in examples.items():
        files: list[TokenFile] = []
        for number, column in enumerate(columns):
            source: Any = rows.sources() if column == "both" else iter(getattr(rows, column))
            key = {**common, "rows": len(rows), "content": rows.identity(), "part": part, "column": column}
            folder = directory / (names[part] + "-2" * number)
            file = tokenise(source, tokenizer, folder, max_length=max_length, key={"data": part, **key})
            if len(file) != len(rows):
                raise DataError(f"{len(rows) - len(file)} texts of the {part} rows give no token at all")
            files.append(file)
        parts[part] = Part(files, targets[part], int(pad))
    train = examples["train"]
    apart = numbered(train.texts, train.seconds) if options.task == "embed" else ()
    return Corpus(tokenizer, parts, Order(parts["train"].lengths_N, options.batch, options.seed, apart))


def numbered(*columns: Sequence[str]) -> tuple[np.ndarray, ...]:
    """Number texts: equal ones of all columns have the same number, [N] each."""
    known: dict[str, int] = {}
    return tuple(np.array([known.setdefault(text, len(known)) for text in column], np.int64) for column in columns)
