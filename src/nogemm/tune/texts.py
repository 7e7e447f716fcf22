"""The texts of a search: what is trained on, what chooses, and what is looked at once, in the end."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from nogemm.train.errors import DataError
from nogemm.train.reader import SAMPLE
from nogemm.train.sources import texts

LEAST = 40
"""Different texts below which nothing can be trained, chosen and tested apart."""
MOST = 200_000
"""Texts that are read; a search trains on far fewer."""


@dataclass(frozen=True)
class Texts:
    """Three disjoint lists of texts, and the content's hash."""

    train: list[str]
    validation: list[str]
    test: list[str]
    sha256: str

    def to_dict(self) -> dict[str, Any]:
        """Return how many there are, and their hash, as JSON values."""
        counts = {name: len(getattr(self, name)) for name in ("train", "validation", "test")}
        return counts | {"sha256": self.sha256}


def split_texts(
    data: str | Path | Iterable[Any], field: str | None = None, *, validation: int, test: int, most: int = MOST
) -> Texts:
    """Read the data and hold texts out by their hash, at most a tenth each; the packaged sample has its own splits.

    A text that stands twice counts once, so that none is on two sides.

    Raises:
        DataError: no text, fewer than `LEAST` different ones, or what cannot be read.
    """
    if isinstance(data, str) and data == SAMPLE:
        train = list(islice(texts(data, field), most))
        known = set(train)
        held = [
            [text for text in dict.fromkeys(texts(data, field, split)) if text not in known]
            for split in ("validation", "test")
        ]
        return _hashed(train, held[0][:validation], held[1][:test])
    found = list(dict.fromkeys(islice(texts(data, field, None), most)))
    if len(found) < LEAST:
        name = data if isinstance(data, (str, Path)) else "the data"
        raise DataError(
            f"{name} holds {len(found)} different texts, tune needs at least {LEAST}: it trains on most of them, "
            "chooses by others, and tests on a third part"
        )
    order = sorted(found, key=_digest)
    tested, chosen = min(test, len(found) // 10), min(validation, len(found) // 10)
    held_out = set(order[: tested + chosen])
    return _hashed([text for text in found if text not in held_out], order[tested : tested + chosen], order[:tested])


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _hashed(train: list[str], validation: list[str], test: list[str]) -> Texts:
    digest = hashlib.sha256()
    for part in (train, validation, test):
        for text in part:
            digest.update(_digest(text))
        digest.update(b"|")
    return Texts(train, validation, test, digest.hexdigest())
