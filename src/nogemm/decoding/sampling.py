"""Sampling by noise that is fixed before the logits are known.

Adding Gumbel noise to logits and taking the largest draws from their softmax. The noise depends on seed, place and
sequence alone, so two ways to the same logits give the same token.

Legend: B sequences, V vocabulary.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nogemm.config import check_int
from nogemm.errors import ConfigError, NotFiniteError


class Sampling:
    """How tokens are drawn.

    Args:
        temperature: above 0; 1 draws from the model's own distribution.
        top_k: only the k largest logits of a sequence, ties with the last of them included; None: all.
        top_p: only the largest that together have this share of the probability, after temperature and top_k; None:
            all.
        seed: of the noise; None: drawn from torch's generator.
    """

    def __init__(self, temperature: float, top_k: int | None, top_p: float | None, seed: int | None) -> None:
        for name, value, high in (("temperature", temperature, math.inf), ("top_p", top_p, 1.0)):
            if value is not None and not (0 < value <= high and math.isfinite(value)):
                most = "" if high == math.inf else " and at most 1"
                raise ConfigError(f"generate: {name} must be above 0{most}, got {value!r}")
        if top_k is not None:
            check_int("generate", "top_k", top_k, 1)
        self.temperature, self.top_k, self.top_p = float(temperature), top_k, top_p
        if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
            raise ConfigError(f"generate: seed must be an integer, got {seed!r}")
        self.seed = int(torch.randint(2**31, ())) if seed is None else seed

    def draw(self, logits_BV: Tensor, place: int) -> Tensor:
        """Draw one token for each sequence, int64 [B], for one place in the text."""
        finite = logits_BV.isfinite().all(1)
        if not bool(finite.all()):
            raise NotFiniteError(f"the logits of sequence {int((~finite).int().argmax())} are not finite")
        scores_BV = self.allowed(logits_BV / self.temperature)
        rows = range(len(scores_BV))
        noise_BV = torch.stack([gumbel(scores_BV.shape[1], self.seed, place, row) for row in rows])
        return (scores_BV + noise_BV).argmax(1)

    def allowed(self, scores_BV: Tensor) -> Tensor:
        """Set the scores of tokens that may not be drawn to minus infinity."""
        if self.top_k is not None and self.top_k < scores_BV.shape[1]:
            least = scores_BV.topk(self.top_k, 1).values[:, -1:]
            scores_BV = scores_BV.masked_fill(scores_BV < least, -torch.inf)
        if self.top_p is not None and self.top_p < 1:
            ranked, order = scores_BV.sort(dim=1, descending=True, stable=True)
            before = ranked.softmax(1).cumsum(1) - ranked.softmax(1)
            dropped = torch.zeros_like(before, dtype=torch.bool).scatter(1, order, before >= self.top_p)
            scores_BV = scores_BV.masked_fill(dropped, -torch.inf)
        return scores_BV


def gumbel(count: int, seed: int, place: int, row: int) -> Tensor:
    """Return `count` numbers of Gumbel's distribution, the same for the same three numbers, float32."""
    mixed = (seed * 1_000_003 + place) * 1_000_033 + row
    source = torch.Generator().manual_seed(mixed % 2**63)
    return -torch.empty(count).exponential_(generator=source).log()
