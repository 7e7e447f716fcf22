"""What a run trains on: batches of tokens, held-out texts, and which tokens are hidden."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from nogemm.train.data import Batch, Batches, tokenise
from nogemm.train.errors import TrainingError
from nogemm.train.masking import Masking
from nogemm.train.options import DistilOptions
from nogemm.train.sources import describe, texts
from nogemm.train.validation import VALIDATION_TOKENS, Validation


@dataclass
class Feed:
    """Hold the batches, the validation texts if there are any, and the masking if there is one."""

    batches: Batches
    validation: Validation | None
    masking: Masking | None

    def take(self, tokens: int) -> list[Batch]:
        """Return the next batches that hold about this many tokens."""
        taken: list[Batch] = []
        while sum(batch.tokens for batch in taken) < tokens:
            taken.append(next(self.batches))
        return taken


def open_feed(
    teacher: nn.Module, options: DistilOptions, directory: Path, data: Any, validation: Any, tokenizer: Any
) -> Feed:
    """Tokenise what is not yet tokenised in `directory`, and open it; arguments as `distil` takes them."""
    tokenizer = tokenizer or default_tokenizer(teacher)
    masking = Masking.of(tokenizer, options.seed) if options.output == "mlm" else None
    key = {
        "data": describe(data),
        "tokenizer": type(tokenizer).__name__,
        "vocabulary": len(tokenizer),
        "field": options.field,
    }
    common = {"tokenizer": tokenizer, "max_length": options.max_length}
    file = tokenise(
        texts(data, options.field), directory=directory / "tokens", key=key, max_tokens=options.tokens, **common
    )
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    batches = Batches(file, batch_tokens=options.batch_tokens, seed=options.seed, pad_id=pad)
    split: str | None = None
    if validation is None and isinstance(data, str) and data == "sample":
        validation, split = "sample", "validation"
    if validation is None:
        return Feed(batches, None, masking)
    held_out = tokenise(
        texts(validation, options.field, split),
        directory=directory / "validation",
        key={**key, "data": f"{describe(validation)} {split}"},
        max_tokens=VALIDATION_TOKENS,
        **common,
    )
    return Feed(batches, Validation(teacher, held_out, 2 * options.batch_tokens, pad), masking)


def default_tokenizer(teacher: nn.Module) -> Any:
    """Load the tokenizer that was saved with the teacher."""
    name = getattr(getattr(teacher, "config", None), "_name_or_path", "")
    if not name:
        raise TrainingError("distil needs a tokenizer: the teacher does not say where it was loaded from")
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(name)
