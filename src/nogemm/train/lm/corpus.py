"""What a run reads: its tokenizer, contexts to train on, and others held out, tokenised once into the run's directory.

Reading order: `open_corpus`, `Corpus`, `training_texts` and `held_out_texts`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from nogemm.errors import ConfigError
from nogemm.models.texts import prepare_tokenizer
from nogemm.train.data import tokenise
from nogemm.train.errors import DataError
from nogemm.train.feed import forget
from nogemm.train.identity import data_identity, tokenizer_identity
from nogemm.train.lm.contexts import Contexts, Guessing, Joined
from nogemm.train.lm.options import TrainOptions
from nogemm.train.lm.tokenizer import save_tokenizer, train_tokenizer
from nogemm.train.reader import SAMPLE
from nogemm.train.sources import is_held_out, is_hub_name, texts

HUB_TOKENS = 100_000_000  # read of a hub's data set where time alone is the budget
Source = str | Path | Iterable[Any]


@dataclass(frozen=True)
class Corpus:
    """A run's tokenizer and contexts.

    Attributes:
        tokenizer: transformers'.
        train, validation: contexts to train on, and held out.
        guessing: what of them is guessed.
        documents: texts to train on.
    """

    tokenizer: Any
    train: Contexts
    validation: Contexts
    guessing: Guessing
    documents: int

    def batch(self, numbers: np.ndarray) -> dict[str, Tensor]:
        """Return inputs and labels of the training contexts with these numbers."""
        return self.guessing.batch(self.train.rows(numbers), numbers)

    def held_out(self, numbers: np.ndarray) -> dict[str, Tensor]:
        """Return inputs and labels of validation contexts; the same ones hide the same tokens at every measurement."""
        return self.guessing.batch(self.validation.rows(numbers), numbers)


def open_corpus(
    options: TrainOptions,
    directory: Path,
    data: Source,
    validation: Source | None = None,
    tokenizer: Any = None,
    resume: bool = False,
) -> Corpus:
    """Tokenise into `directory`, or open what an earlier part of the same run left there.

    Args:
        tokenizer: transformers'; None: one that is trained on the data.
    Raises:
        DataError: no text, less than the smallest batch needs, or other data than the run began with.
        ConfigError: the tokenizer lacks a token that the task needs.
    """
    for name, source in (("data", data), ("validation", validation)):
        if isinstance(source, Iterator):
            raise ConfigError(
                f"train: {name} must be readable more than once (for a tokenizer, for training, for what is held out): "
                f"a file, a list or a data set, got {type(source).__name__}"
            )
    if not resume:
        forget(directory, ("tokens", "validation", "tokenizer"))
    share = options.validation_share
    hidden = validation is None and not is_sample(data)

    def learnt() -> Iterator[str]:
        return training_texts(data, options.field, share if hidden else 0.0)

    def held() -> Iterator[str]:
        if hidden:
            return held_out_texts(data, options.field, share)
        split = "validation" if validation is None else None
        return texts(opened(data if validation is None else validation), options.field, split)

    tokenizer = prepare_tokenizer(tokenizer or _own_tokenizer(options, directory, learnt))
    joined = Joined(tokenizer)
    identity = tokenizer_identity(tokenizer)

    def stream(name: str, source: Source, rows: Callable[[], Iterator[str]], limit: int | None) -> Contexts:
        key = {**data_identity(source, rows), "tokenizer": identity, "field": options.field, "part": name}
        key |= {"validation_share": share if hidden else None}
        file = tokenise(rows(), joined, directory / name, max_length=0, key=key, max_tokens=limit)
        return Contexts(file, options.context, options.seed, *_frame(options, tokenizer))

    train = stream("tokens", data, learnt, _needed(options, data))
    held_out = stream("validation", data if validation is None else validation, held, options.validation_tokens)
    _check_size(train, held_out, options, hidden)
    guessing = Guessing(
        mask_id=_mask_id(tokenizer) if options.task == "mlm" else None,
        vocabulary=len(tokenizer),
        special=tuple(sorted(set(tokenizer.all_special_ids))),
        share=options.mask,
        seed=options.seed,
    )
    return Corpus(tokenizer, train, held_out, guessing, len(train.file))


def training_texts(data: Source, field: str | None, share: float) -> Iterator[str]:
    """Yield the texts that are not held out."""
    for text in texts(opened(data), field):
        if not is_held_out(text, share):
            yield text


def held_out_texts(data: Source, field: str | None, share: float) -> Iterator[str]:
    """Yield the texts that are held out.

    Raises:
        DataError: there is none.
    """
    found = False
    for text in texts(opened(data), field):
        if is_held_out(text, share):
            found = True
            yield text
    if not found:
        raise DataError(
            f"the data leaves no text to validate on (validation_share={share}): give more texts, a larger share, or "
            "validation texts of your own"
        )


def is_sample(data: Source) -> bool:
    """Say whether the packaged sample is meant, which has a validation split of its own."""
    return isinstance(data, str) and data == SAMPLE


def opened(data: Source) -> Source:
    """Open a hub's data set as a stream of its training split; other data is returned as it is.

    Raises:
        DataError: `datasets` is not installed, or cannot open it.
    """
    if not is_hub_name(data):
        return data
    if importlib.util.find_spec("datasets") is None:
        raise DataError(f"{data}: no such file, and for a data set of the hub: pip install 'nogemm[train]'")
    import datasets

    name, _, config = str(data).partition(":")
    try:
        return datasets.load_dataset(name, config or None, split="train", streaming=True)
    except Exception as error:  # what the hub's libraries raise has no common base
        raise DataError(f"{data}: no such file, and the hub's data set cannot be opened: {error}") from error


def _own_tokenizer(options: TrainOptions, directory: Path, rows: Callable[[], Iterator[str]]) -> Any:
    """Load the tokenizer that the run has trained, or train it."""
    from transformers import AutoTokenizer

    folder = directory / "tokenizer"
    if not folder.is_dir():
        save_tokenizer(train_tokenizer(rows(), options.vocabulary, framed=options.task == "mlm"), folder)
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def _needed(options: TrainOptions, data: Source) -> int | None:
    """Return how many tokens the budget can use; None: all that there are."""
    limits = [options.data_tokens, options.tokens]
    limits += [None if options.steps is None else options.steps * options.batch * options.context]
    known = [limit for limit in limits if limit is not None]
    if known:
        return min(known)
    return HUB_TOKENS if is_hub_name(data) else None


def _frame(options: TrainOptions, tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return what the tokenizer puts before and behind a text, for encoders; decoders read the stream as it is."""
    if options.task == "clm":
        return [], []
    plain, framed = tokenizer("a", add_special_tokens=False)["input_ids"], tokenizer("a")["input_ids"]
    at = next(i for i in range(len(framed)) if framed[i : i + len(plain)] == plain)
    return framed[:at], framed[at + len(plain) :]


def _mask_id(tokenizer: Any) -> int:
    if tokenizer.mask_token_id is None:
        raise ConfigError(
            f'train: task="mlm" needs a tokenizer with a mask token; this {type(tokenizer).__name__} has none'
        )
    return int(tokenizer.mask_token_id)


def _check_size(train: Contexts, held_out: Contexts, options: TrainOptions, hidden: bool) -> None:
    """Refuse data that is too small to train or to validate on."""
    if train.count < options.batch:
        raise DataError(
            f"the data holds {len(train.file.tokens):,} tokens to train on, {train.count} contexts of "
            f"{options.context}, and a batch takes {options.batch}: give more text, or a smaller context or batch"
        )
    if held_out.count < 1:
        raise DataError(
            f"the validation texts hold {len(held_out.file.tokens):,} tokens, less than one context of "
            f"{options.context}: give more text"
            + (f", a validation_share above {options.validation_share}," if hidden else "")
            + " or a smaller context"
        )
