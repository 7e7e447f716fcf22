"""Texts as one stream of tokens, cut into contexts without padding; which tokens of a context are guessed.

    text </s> text </s> ...  ->  contexts of L tokens, in an order fixed by a seed  ->  inputs and labels

Contexts are numbered over all epochs and all processes: number g holds the same tokens, hidden at the same places,
whoever asks for it. So a run's data depend on its seed alone, not on how often it was stopped or how many processes
share it.

Legend: S contexts of a batch, L positions, G numbers of contexts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nogemm.errors import ConfigError
from nogemm.train.data import TokenFile, hash_words, permuted

IGNORED = -100  # the label of a token that is not guessed
HIDDEN, REPLACED = 0.8, 0.9  # of the guessed tokens: hidden up to here, replaced up to there, the rest is shown


class Joined:
    """A tokenizer that `tokenise` can call: nothing is cut, and every text ends with the separator."""

    def __init__(self, tokenizer: Any) -> None:
        end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
        if end is None:
            raise ConfigError(
                f"train: {type(tokenizer).__name__} has neither an end-of-text token nor a separator, which has to "
                "stand between two texts"
            )
        self.tokenizer, self.end = tokenizer, int(end)

    def __call__(self, texts: list[str], **_: Any) -> dict[str, list[list[int]]]:
        found = self.tokenizer(
            texts, add_special_tokens=False, truncation=False, padding=False, return_attention_mask=False,
            return_token_type_ids=False, verbose=False,
        )  # fmt: skip
        return {"input_ids": [[*ids, self.end] for ids in found["input_ids"]]}


class Contexts:
    """Contexts of a token file by number: epoch g // count in an order of its own, cut at a place of its own.

    Attributes:
        count: contexts of an epoch; the rest of the stream, less than one context, is left out of it.
    """

    def __init__(
        self, file: TokenFile, context: int, seed: int, before: Sequence[int] = (), after: Sequence[int] = ()
    ) -> None:
        self.file, self.context, self.seed = file, context, seed
        self.before, self.after = list(before), list(after)
        self.body = context - len(self.before) - len(self.after)
        self.count = len(file.tokens) // self.body

    def rows(self, numbers_G: np.ndarray) -> np.ndarray:
        """Return the contexts of these numbers, int64 [G, L]."""
        out_GL = np.empty((len(numbers_G), self.context), np.int64)
        out_GL[:, : len(self.before)] = self.before
        out_GL[:, len(self.before) + self.body :] = self.after
        rest = len(self.file.tokens) - self.count * self.body
        for epoch in np.unique(numbers_G // self.count):
            here = numbers_G // self.count == epoch
            order = permuted(numbers_G[here] % self.count, self.count, seed=hash_words(self.seed, int(epoch)))
            start = hash_words(self.seed, int(epoch), 1) % (rest + 1)
            for row, index in zip(np.flatnonzero(here), order, strict=True):
                first = start + int(index) * self.body
                out_GL[row, len(self.before) : len(self.before) + self.body] = self.file.tokens[
                    first : first + self.body
                ]
        return out_GL


@dataclass(frozen=True)
class Guessing:
    """Choose what is guessed: of a masked language model some tokens, of a causal one the next.

    Attributes:
        mask_id: stands for a hidden token; None: the next token is guessed.
        vocabulary: replaced tokens are drawn from so many.
        special: ids that are guessed last, where a context has no others.
        share: of a context's tokens that are guessed; their number is the same in every context.
        seed: another one chooses other tokens.
    """

    mask_id: int | None
    vocabulary: int
    special: tuple[int, ...]
    share: float
    seed: int

    def batch(self, ids_SL: np.ndarray, numbers_S: np.ndarray) -> dict[str, Tensor]:
        """Return the inputs of contexts and, at each position, the token that is to be guessed there or -100."""
        labels_SL = np.full_like(ids_SL, IGNORED)
        if self.mask_id is None:
            labels_SL[:, :-1] = ids_SL[:, 1:]
            return {"input_ids": torch.from_numpy(ids_SL), "labels": torch.from_numpy(labels_SL)}
        inputs_SL = ids_SL.copy()
        count = self.guessed(ids_SL.shape[1])
        for row, number in enumerate(numbers_S):
            source = np.random.default_rng([self.seed, int(number)])
            rank_L = source.random(ids_SL.shape[1]) + np.isin(ids_SL[row], self.special)
            chosen = np.argpartition(rank_L, count - 1)[:count]
            chosen.sort()
            labels_SL[row, chosen] = ids_SL[row, chosen]
            fate, other = source.random(count), source.integers(self.vocabulary, size=count)
            shown = inputs_SL[row, chosen]
            inputs_SL[row, chosen] = np.where(fate < HIDDEN, self.mask_id, np.where(fate < REPLACED, other, shown))
        return {"input_ids": torch.from_numpy(inputs_SL), "labels": torch.from_numpy(labels_SL)}

    def guessed(self, context: int) -> int:
        """Return how many tokens of a context are guessed."""
        return context - 1 if self.mask_id is None else min(context, max(1, round(self.share * context)))
