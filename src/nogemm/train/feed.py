"""What a run trains on: batches of tokens, held-out texts, and which tokens are hidden."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from nogemm.models.loading import load_tokenizer
from nogemm.models.pooling import MEAN, Pooling
from nogemm.models.texts import longest_text, prepare_tokenizer
from nogemm.train.data import Batch, Batches, TokenFile, tokenise
from nogemm.train.errors import TrainingError
from nogemm.train.identity import data_identity, tokenizer_identity
from nogemm.train.masking import Masking
from nogemm.train.options import DistilOptions
from nogemm.train.sources import text_pairs, texts
from nogemm.train.validation import VALIDATION_TOKENS, Validation


@dataclass
class Feed:
    """Hold the batches, the validation texts and the masking if there are any, and how embeddings are pooled."""

    batches: Batches
    validation: Validation | None
    masking: Masking | None
    pooling: Pooling

    def take(self, tokens: int) -> list[Batch]:
        """Return the next batches that hold about this many tokens."""
        taken: list[Batch] = []
        while sum(batch.tokens for batch in taken) < tokens:
            taken.append(next(self.batches))
        return taken


def open_feed(
    teacher: nn.Module,
    options: DistilOptions,
    directory: Path,
    data: Any,
    validation: Any,
    tokenizer: Any,
    resume: bool = False,
    pooling: Pooling = MEAN,
) -> Feed:
    """Tokenise into `directory` and open it; arguments as `distil` takes them.

    Tokens of an earlier run are used to resume it, and then only if data, tokenizer and choices are what they were.
    """
    tokenizer = prepare_tokenizer(tokenizer or default_tokenizer(teacher))
    masking = Masking.of(tokenizer, options.seed) if options.output == "mlm" else None
    if not resume:
        forget(directory, ("tokens", "validation"))

    common = {"tokenizer": tokenizer_identity(tokenizer), "field": options.field, "pair": options.pair}

    def tokens(name: str, source: Any, split: str | None, limit: int | None) -> TokenFile:
        def rows() -> Iterator[str] | Iterator[tuple[str, str]]:
            if options.pair is not None:
                return text_pairs(source, options.pair, split)
            return texts(source, options.field, split)

        return tokenise(
            rows(),
            tokenizer,
            directory / name,
            max_length=longest_text(options.max_length, tokenizer, teacher),
            key={**data_identity(source, rows), **common, "split": split},
            max_tokens=limit,
        )

    file = tokens("tokens", data, "train", options.tokens)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    batches = Batches(file, batch_tokens=options.batch_tokens, seed=options.seed, pad_id=pad)
    split: str | None = None
    if validation is None and isinstance(data, str) and data == "sample":
        validation, split = "sample", "validation"
    if validation is None:
        return Feed(batches, None, masking, pooling)
    held_out = tokens("validation", validation, split, VALIDATION_TOKENS)
    return Feed(batches, Validation(teacher, held_out, 2 * options.batch_tokens, pad, pooling), masking, pooling)


def forget(directory: Path, names: Iterable[str]) -> None:
    """Remove the tokens of a run that ended before its first checkpoint: nobody knows what they were made from."""
    for name in names:
        if any((directory / name / mark).is_file() for mark in ("info.json", "tokenizer.json")):
            shutil.rmtree(directory / name)
        for leftover in directory.glob(f"{name}.tmp-*"):
            shutil.rmtree(leftover, ignore_errors=True)


def default_tokenizer(teacher: nn.Module) -> Any:
    """Load the tokenizer that was saved with the teacher."""
    name = getattr(getattr(teacher, "config", None), "_name_or_path", "")
    if not name:
        raise TrainingError("distil needs a tokenizer: the teacher does not say where it was loaded from")
    return load_tokenizer(name)
