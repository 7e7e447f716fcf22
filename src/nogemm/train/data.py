"""Token batches from texts: tokenised once into a file, read back in a seeded order, grouped by length.

    source texts -> TokenFile (tokens.bin, offsets.bin, types.bin, mapped into memory) -> Batches

Memory stays bounded whatever the data's size: tokenising holds a thousand texts, the files are memory-mapped, the order
of an epoch is a keyed permutation that is computed and never stored, and a pool of a few thousand texts is sorted by
length at a time. A position is three integers, so an interrupted run continues with the very batch it would have had.

Legend: N tokens of a batch, S its sequences, L its longest sequence.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nogemm.files import parse_json
from nogemm.train.errors import DataError

TEXTS_AT_ONCE = 1000
POOL = 4096
"""Texts that are sorted by length together: large enough for even batches, small against any data worth training on."""


@dataclass(frozen=True)
class Batch:
    """Sequences of similar length, padded on the right: `ids` and `mask`, both int64 [S, L].

    `types`, of the same form, says which text of a pair a token belongs to, where the tokenizer says so.
    """

    ids: Tensor
    mask: Tensor
    types: Tensor | None = None

    @property
    def tokens(self) -> int:
        """Count the tokens that are not padding."""
        return int(self.mask.sum())


@dataclass
class Position:
    """Where the next batch comes from: the epoch, the pool in it, the batch in that pool."""

    epoch: int = 0
    pool: int = 0
    batch: int = 0


class TokenFile:
    """Tokenised texts in memory-mapped files: all tokens in a row, where each text starts, perhaps token types."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        try:
            info = parse_json((directory / "info.json").read_text(encoding="utf-8"))
            self.key: dict[str, Any] = info["key"]
            self.offsets = np.memmap(directory / "offsets.bin", dtype=np.int64, mode="r")
            self.tokens = np.memmap(directory / "tokens.bin", dtype=np.int32, mode="r")
            self.types = np.memmap(directory / "types.bin", dtype=np.int8, mode="r") if info.get("types") else None
            counts = {len(part) for part in (self.tokens, self.types) if part is not None}
            whole = len(self.offsets) == info["texts"] + 1 and counts == {info["tokens"]}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{directory} is damaged ({error}): delete it and start again") from error
        if not whole:
            raise DataError(f"{directory} is damaged: delete it and start again")

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def lengths(self, index: np.ndarray) -> np.ndarray:
        """Return how many tokens each of the given texts has."""
        return self.offsets[index + 1] - self.offsets[index]

    def text(self, index: int) -> np.ndarray:
        """Return the token ids of one text, int32 [length]."""
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]

    def text_types(self, index: int) -> np.ndarray:
        """Return the token types of one text, int8 [length]; the file must hold types."""
        assert self.types is not None
        return self.types[self.offsets[index] : self.offsets[index + 1]]


def tokenise(
    source: Iterable[str] | Iterable[tuple[str, str]],
    tokenizer: Any,
    directory: Path,
    *,
    max_length: int,
    key: dict[str, Any],
    max_tokens: int | None = None,
) -> TokenFile:
    """Tokenise texts into `directory`, or open what a run with the same `key` left there.

    Args:
        source: texts, or pairs that a model reads together; read only when the directory does not hold them yet.
        tokenizer: a transformers tokenizer; special tokens are its own.
        max_length: longer texts are cut to this many tokens.
        key: what the content depends on (source, tokenizer, length); compared with the stored one.
        max_tokens: stop reading once this many are stored, so that endless streams end.
    Raises:
        DataError: no text at all, or a directory that holds other data.
    """
    key = json.loads(json.dumps({**key, "max_length": max_length, "max_tokens": max_tokens}))
    if (directory / "info.json").is_file():
        stored = TokenFile(directory)
        if stored.key != key:
            raise DataError(
                f"{directory} holds tokens of other data or choices ({'; '.join(_changes(stored.key, key))}): "
                "go on with what they were made from, or start a new run: without resume, or choose another directory"
            )
        return stored
    temporary = directory.with_name(f"{directory.name}.tmp-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        texts, tokens, typed = _write_tokens(iter(source), tokenizer, temporary, max_length, max_tokens)
        if texts == 0:
            raise DataError("the data holds no text")
        info = {"key": key, "texts": texts, "tokens": tokens, "types": typed}
        (temporary / "info.json").write_text(json.dumps(info), encoding="utf-8")
        os.replace(temporary, directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return TokenFile(directory)


def _changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """List what differs; a source of the same name has changed itself."""
    same_name = before.get("data") == now.get("data")
    words = {"content": f"{now.get('data')} has changed since" if same_name else "its content", "data": "the data"}
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    return [f"{words.get(name, name)}: {before.get(name, 'not recorded')}, now {now.get(name)}" for name in names]


def _write_tokens(
    source: Iterator[Any], tokenizer: Any, directory: Path, max_length: int, max_tokens: int | None
) -> tuple[int, int, bool]:
    """Write the files; return how many texts and tokens, and whether the tokens have types."""
    texts = total = 0
    typed = False
    with ExitStack() as files:
        tokens, offsets, kinds = (
            files.enter_context(open(directory / f"{name}.bin", "wb")) for name in ("tokens", "offsets", "types")
        )
        offsets.write(np.zeros(1, np.int64).tobytes())
        while chunk := list(islice(source, TEXTS_AT_ONCE)):
            columns = zip(*chunk, strict=True) if isinstance(chunk[0], tuple) else [chunk]
            encoded = tokenizer(*map(list, columns), truncation=True, max_length=max_length, padding=False)
            types = encoded.get("token_type_ids")
            for i, ids in enumerate(encoded["input_ids"]):
                if not ids:
                    continue
                tokens.write(np.asarray(ids, np.int32).tobytes())
                if types is not None:
                    typed = True
                    kinds.write(np.asarray(types[i], np.int8).tobytes())
                total += len(ids)
                texts += 1
                offsets.write(np.asarray([total], np.int64).tobytes())
            if max_tokens is not None and total >= max_tokens:
                break
    return texts, total, typed


class Batches:
    """Endless batches of about `batch_tokens` tokens (padding included), in an order fixed by `seed`.

    Texts are drawn without replacement within an epoch; texts of similar length share a batch.
    `position` is the whole state: assign it to continue where another run stopped.
    """

    def __init__(self, file: TokenFile, *, batch_tokens: int, seed: int, pad_id: int, pool: int = POOL) -> None:
        self.file = file
        self.batch_tokens = batch_tokens
        self.seed = seed
        self.pad_id = pad_id
        self.pool_size = pool
        self.position = Position()
        self._loaded: tuple[int, int] | None = None
        self._pool: list[np.ndarray] = []

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        here = self.position
        if self._loaded != (here.epoch, here.pool):
            self._pool = self._make_pool(here.epoch, here.pool)
            self._loaded = (here.epoch, here.pool)
        batch = self.padded(self._pool[here.batch])
        self.position = self._after(here)
        return batch

    def state(self) -> dict[str, int]:
        """Return the position as JSON-ready numbers."""
        return asdict(self.position)

    def load_state(self, state: dict[str, int]) -> None:
        """Continue from a position that `state` returned."""
        self.position = Position(**state)

    def padded(self, index: np.ndarray) -> Batch:
        """Return the given texts as one padded batch."""
        rows = [self.file.text(int(i)) for i in index]
        longest = max(len(row) for row in rows)
        ids = np.full((len(rows), longest), self.pad_id, np.int64)
        mask, types = np.zeros((2, len(rows), longest), np.int64)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = row
            mask[i, : len(row)] = 1
            if self.file.types is not None:
                types[i, : len(row)] = self.file.text_types(int(index[i]))
        kinds = None if self.file.types is None else torch.from_numpy(types)
        return Batch(torch.from_numpy(ids), torch.from_numpy(mask), kinds)

    def _after(self, here: Position) -> Position:
        if here.batch + 1 < len(self._pool):
            return Position(here.epoch, here.pool, here.batch + 1)
        pools = -(-len(self.file) // self.pool_size)
        return Position(here.epoch, here.pool + 1) if here.pool + 1 < pools else Position(here.epoch + 1)

    def _make_pool(self, epoch: int, pool: int) -> list[np.ndarray]:
        count = len(self.file)
        steps = np.arange(pool * self.pool_size, min(count, (pool + 1) * self.pool_size))
        index = permuted(steps, count, seed=hash_words(self.seed, epoch))
        lengths = self.file.lengths(index)
        order = np.argsort(lengths, kind="stable")
        batches = [index[part] for part in _cuts(order, lengths, self.batch_tokens)]
        shuffle = np.random.default_rng([self.seed, epoch, pool]).permutation(len(batches))
        return [batches[i] for i in shuffle]


def _cuts(order: np.ndarray, lengths: np.ndarray, batch_tokens: int) -> Iterator[np.ndarray]:
    """Cut texts, shortest first, into runs whose count times longest stays within `batch_tokens`."""
    start = 0
    for end in range(1, len(order) + 1):
        if end == len(order) or (end + 1 - start) * lengths[order[end]] > batch_tokens:
            yield order[start:end]
            start = end


def hash_words(*words: int) -> int:
    """Mix integers into one 32-bit key (numpy's own seed mixing)."""
    return int(np.random.SeedSequence(list(words)).generate_state(1)[0])


def permuted(steps: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Map distinct steps of [0, count) to distinct indices of [0, count), in O(1) memory.

    A four-round Feistel network over the next even number of bits; values outside the range walk the cycle on.
    """
    half = max(1, -(-max(1, int(count - 1).bit_length()) // 2))
    mask = np.uint64((1 << half) - 1)
    keys = np.random.SeedSequence(seed).generate_state(4, np.uint64)
    value = steps.astype(np.uint64)
    outside = np.ones(len(value), dtype=bool)
    while outside.any():
        left, right = value[outside] >> np.uint64(half), value[outside] & mask
        for key in keys:
            mixed = (right + key) * np.uint64(0x9E3779B97F4A7C15)
            mixed ^= mixed >> np.uint64(29)
            mixed *= np.uint64(0xBF58476D1CE4E5B9)
            left, right = right, left ^ ((mixed >> np.uint64(33)) & mask)
        value[outside] = (left << np.uint64(half)) | right
        outside = value >= count
    return value.astype(np.int64)
